"""`python -m lora_kernels doctor`, `self-test` and `tune`."""

import argparse
import os
import sys

import torch

COMMANDS = {
    "doctor": "versions, devices, which backends can serve, what auto picks and why",
    "self-test": "tries our kernels on this machine; `self-test --help` for more",
    "tune": "measures what auto may take on this machine; `tune --help` for more",
}

# M, K, N, dropout: a decode step, a small model's step, a large model's step, with dropout.
SHAPES = (
    (8, 4096, 4096, 0.0),
    (512, 576, 1536, 0.0),
    (8192, 4096, 4096, 0.0),
    (512, 576, 1536, 0.05),
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        command = " ".join(["python -m benchmarks", *argv[1:2]])
        print(f"The benchmarks are in the source tree: {command}", file=sys.stderr)
        return 2
    # These have a parser and a --help of their own.
    if argv[:1] == ["tune"]:
        from lora_kernels.measuring import command

        return command.main(argv[1:])
    if argv[:1] == ["self-test"]:
        from lora_kernels.self_test import command

        return command.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m lora_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what)
    parser.parse_args(argv)
    print("\n".join(doctor()))
    return 0


def doctor() -> list[str]:
    """What a user in trouble, or a bug report, needs to know; as lines of text."""
    import lora_kernels
    from lora_kernels.measuring import machine
    from lora_kernels.runtime import cpu_extension, cuda_extension

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    lines = [f"lora_kernels  {lora_kernels.__version__}"]
    lines += [
        f"{name:<13} {version or 'not installed'}" for name, version in machine.versions().items()
    ]
    lines.append(f"{'extension':<13} {cpu_extension.status()}")
    first, *more = cuda_extension.status().splitlines()
    lines += [f"{'CUDA kernels':<13} {first}", *(" " * 14 + line for line in more)]
    override = os.environ.get("LORA_KERNELS_BACKEND")
    lines.append(f"LORA_KERNELS_BACKEND  {override or 'not set: auto decides'}")
    for device in devices:
        lines += ["", f"{device}  {_describe(device)}"]
        lines += _backends(device)
        lines += _standing(device)
        lines += _choices(device)
    return lines


def _describe(device: torch.device) -> str:
    from lora_kernels.measuring import machine

    if device.type == "cpu":
        features = " ".join(machine.cpu_features()) or "none of those asked for"
        return f"{machine.cpu_name()}, {torch.get_num_threads()} threads, {features}"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda or torch.version.hip}"
    )


def _backends(device: torch.device) -> list[str]:
    from lora_kernels.runtime import dispatch

    reasons = {name: dispatch.unavailable(name, device) for name in dispatch.BACKENDS}
    return [f"  {name:<10} {reason or 'available'}" for name, reason in reasons.items()]


def _standing(device: torch.device) -> list[str]:
    from lora_kernels.integrations.kernels_option import standing

    return [f"  {line}" for line in standing([device], proofs_on_cpu=True)]


def _choices(device: torch.device) -> list[str]:
    """What a default call takes. Tensors are never written, so large ones cost nothing here."""
    from lora_kernels import explain

    rank, dtype = 16, torch.bfloat16
    lines = []
    for m, k, n, dropout_p in SHAPES:
        x, weight = (torch.empty(rows, k, dtype=dtype, device=device) for rows in (m, n))
        lora_a, lora_b = (torch.empty(*s, device=device) for s in ((rank, k), (n, rank)))
        shape = f"M {m}, K {k}, N {n}, r {rank}, bf16, dropout {dropout_p:g}"
        try:
            choice = explain(x, weight, lora_a, lora_b, 2.0, dropout_p=dropout_p)
            answer = f"{choice.backend}: {choice.reason}"
        except ValueError as error:  # LORA_KERNELS_BACKEND names one that cannot serve
            answer = f"raises: {error}"
        lines += [f"  {shape}", f"      {answer}"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
