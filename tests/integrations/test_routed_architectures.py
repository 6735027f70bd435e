"""What is known of architectures: which axis is the batch's, and whose rows are the text's."""

import importlib
import re

import pytest
import torch
import transformers
from routed_models import PAD, VOCABULARY, routed_toy, tokens, written
from torch import nn

from lora_kernels import Routing
from lora_kernels.integrations.layer_places import _SEQUENCE_FIRST, place_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*gradient_checkpointing.*:FutureWarning"
)

# --- architectures that are known -------------------------------------------------------------


def xlnet():
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24, initializer_range=0.3
    )
    return transformers.XLNetLMHeadModel(config).eval()


def longformer():
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        attention_window=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    return transformers.LongformerModel(config).eval()


SEQUENCE_FIRST = {
    "XLNet": (xlnet, ["layer_1", "layer_2"], ["lm_loss"]),
    "Longformer": (longformer, ["query", "value"], ["intermediate.dense"]),
}


@torch.no_grad()
@pytest.mark.parametrize(("make", "inner", "outer"), SEQUENCE_FIRST.values(), ids=SEQUENCE_FIRST)
def test_architectures_that_compute_sequence_first(make, inner, outer):
    """Without batch_dim they raise, also where tokens are as many as rows; with it they are right,
    in the layers that come batch first too."""
    ids = tokens(4, 4)
    names = ["one", "two", "two", "one"]
    routed = routed_toy(make(), *inner)
    with routed.adapters(names), pytest.raises(ValueError, match=r"pass batch_dim=1 to route"):
        routed.model(ids)
    routed = routed_toy(make(), *inner, *outer, batch_dim=1)
    with routed.adapters(names):
        ours = routed.model(ids)[0]
    for row, name in enumerate(names):
        with routed.adapters(name):
            torch.testing.assert_close(ours[row], routed.model(ids)[0][row])


def test_every_architecture_on_the_list_is_there():
    for family, entries in _SEQUENCE_FIRST.items():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for entry in entries:
            assert hasattr(module, entry.partition(".")[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_says_which_axis(batch_first):
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=batch_first)
    model = nn.ModuleDict({"layer": layer})
    assert place_of(model, "layer.linear1").axis == (0 if batch_first else 1)


# --- images -----------------------------------------------------------------------------------

IMAGE = VOCABULARY - 1


def llava():
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "initializer_range": 0.3,
    }
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).double().eval()


TARGETS = ["q_proj", "fc1", "linear_1", "lm_head"]


@torch.no_grad()
@pytest.mark.parametrize("said", ["names", "one name each", "a routing"])
def test_as_many_images_as_names(said):
    """Both images are the first row's: each takes that row's adapter, not one by its number."""
    routed = routed_toy(llava(), *TARGETS)
    model = routed.model
    ids = tokens(2, 10).clamp_max(IMAGE - 1)
    ids[0, 1:9] = IMAGE
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    names = ["one", "two"]
    with routed.adapters(names), pytest.raises(ValueError) as error:
        model(input_ids=ids, pixel_values=images)
    assert re.search(r"vision_tower\..*q_proj: its rows are not those of", str(error.value))
    assert "rows={'model.vision_tower': ...}" in str(error.value)
    routing = Routing.from_sequences(names, 10, routed.slots)
    with routed.adapters(routing), pytest.raises(ValueError, match="its rows are not"):
        model(input_ids=ids, pixel_values=images)
    seen = r"linear_1: .* rows={'model.multi_modal_projector'"
    with (
        routed.adapters(names, rows={"model.vision_tower": "one"}),
        pytest.raises(ValueError, match=seen),
    ):
        model(input_ids=ids, pixel_values=images)
    patches = {"model.vision_tower": 5, "model.multi_modal_projector": 4}
    of_images = {
        "names": {prefix: ["one", "one"] for prefix in patches},
        "one name each": dict.fromkeys(patches, "one"),
        "a routing": {
            prefix: Routing.from_sequences(["one", "one"], length, routed.slots)
            for prefix, length in patches.items()
        },
    }[said]
    with routed.adapters(names, rows=of_images):
        ours = model(input_ids=ids, pixel_values=images).logits
        # A routing has its length, and older transformers expand the images with the beams.
        beams = 1 if said == "a routing" else 2
        written(model, ids, pixel_values=images, num_beams=beams, max_new_tokens=2)
    with routed.adapters("one"):
        theirs = model(input_ids=ids[:1], pixel_values=images).logits[0]
    torch.testing.assert_close(ours[0], theirs)
    with routed.adapters("two"):
        torch.testing.assert_close(ours[1], model(input_ids=ids[1:]).logits[0])
        assert not torch.allclose(model(input_ids=ids[:1], pixel_values=images).logits[0], theirs)
    with routed.adapters(names):  # nothing is asked of the images' part without images
        model(input_ids=ids[1:].repeat(2, 1))


def test_text_has_its_rows_in_every_part():
    """An encoder and a decoder of texts, heads, and parts that read other things."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=16, **small)
    vit = transformers.ViTConfig(hidden_size=16, image_size=8, patch_size=4, **small)
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs
    texts = transformers.EncoderDecoderModel(pair(bert, bert))
    assert all(place_of(texts, name).apart is None for name in linears(texts))
    seeing = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, bert)
    reads_images = transformers.VisionEncoderDecoderModel(seeing)
    apart = {place_of(reads_images, name).apart for name in linears(reads_images, "encoder.")}
    assert apart == {"encoder"}
    assert {place_of(reads_images, name).apart for name in linears(reads_images, "decoder.")} == {
        None
    }
    images = transformers.ViTForImageClassification(vit)  # they are the rows
    assert all(place_of(images, name).apart is None for name in linears(images))


def linears(model, prefix=""):
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in found if name.startswith(prefix)]
