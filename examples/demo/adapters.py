"""Adapters on disk, in PEFT's format; whole or not at all."""

import shutil
from pathlib import Path

from peft import PeftModel


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the model's adapter as `folder`, replacing the one that is there.

    It is written beside it and moved there complete: whatever stops this process, and whenever,
    `folder` never holds a part of an adapter.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        # The adapter has no embeddings; "auto" would look the base up on the hub to find out.
        model.save_pretrained(partial, save_embedding_layers=False)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Move the folder `new` to `folder`; on any exception the previous one is there again."""
    previous = folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(previous)
        new.rename(folder)
    finally:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)


def adapter_bytes(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size
