"""Weights of other libraries: their names and shapes for a ViT, and ours.

Copy this file: it works alone and needs torch only.

Letters for shapes: E embed, C channels, P patch side, L tokens (1 + N), M width inside
the feed-forward networks, K classes, F = P·P·C numbers in a patch.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["from_huggingface", "from_timm", "from_torchvision", "to_torchvision"]

StateDict = Mapping[str, Tensor]
# Our name -> their name, or names of what stands below each other in our tensor.
# "*" is the number of a layer, "{}" both "weight" and "bias".
Names = dict[str, str | tuple[str, ...]]
# Our parameter -> the parts it is made of, and how each is shaped, in letters.
Layout = dict[str, tuple[tuple[str, ...], list[str]]]

# Every parameter of minivit.ViT, and the shape of the weight. The bias of a linear
# map or a normalisation is as long as its weight is high.
SHAPES = {
    "cls_token": "1 1 E",
    "pos_embed": "1 L E",
    "patch_embed.proj.{}": "E F",
    "encoder.layers.*.norm1.{}": "E",
    "encoder.layers.*.self_attention.in_proj.{}": "3E E",
    "encoder.layers.*.self_attention.out_proj.{}": "E E",
    "encoder.layers.*.norm2.{}": "E",
    "encoder.layers.*.feed_forward.linear1.{}": "M E",
    "encoder.layers.*.feed_forward.linear2.{}": "E M",
    "encoder.norm.{}": "E",
    "head.{}": "K E",
}
PATCHES = "patch_embed.proj.{}"  # the others store it as a convolution, E C P P

MINIVIT: Names = {name: name for name in SHAPES}
TORCHVISION: Names = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.{}": "conv_proj.{}",
    "encoder.layers.*.norm1.{}": "encoder.layers.encoder_layer_*.ln_1.{}",
    "encoder.layers.*.self_attention.in_proj.{}": (
        "encoder.layers.encoder_layer_*.self_attention.in_proj_{}"
    ),
    "encoder.layers.*.self_attention.out_proj.{}": (
        "encoder.layers.encoder_layer_*.self_attention.out_proj.{}"
    ),
    "encoder.layers.*.norm2.{}": "encoder.layers.encoder_layer_*.ln_2.{}",
    "encoder.layers.*.feed_forward.linear1.{}": (
        "encoder.layers.encoder_layer_*.mlp.0.{}"
    ),
    "encoder.layers.*.feed_forward.linear2.{}": (
        "encoder.layers.encoder_layer_*.mlp.3.{}"
    ),
    "encoder.norm.{}": "encoder.ln.{}",
    "head.{}": "heads.head.{}",
}
# Before torchvision 0.14, and in the files that it still offers for download.
TORCHVISION_OLD: Names = TORCHVISION | {
    "encoder.layers.*.feed_forward.linear1.{}": (
        "encoder.layers.encoder_layer_*.mlp.linear_1.{}"
    ),
    "encoder.layers.*.feed_forward.linear2.{}": (
        "encoder.layers.encoder_layer_*.mlp.linear_2.{}"
    ),
}
TIMM: Names = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj.{}": "patch_embed.proj.{}",
    "encoder.layers.*.norm1.{}": "blocks.*.norm1.{}",
    "encoder.layers.*.self_attention.in_proj.{}": "blocks.*.attn.qkv.{}",
    "encoder.layers.*.self_attention.out_proj.{}": "blocks.*.attn.proj.{}",
    "encoder.layers.*.norm2.{}": "blocks.*.norm2.{}",
    "encoder.layers.*.feed_forward.linear1.{}": "blocks.*.mlp.fc1.{}",
    "encoder.layers.*.feed_forward.linear2.{}": "blocks.*.mlp.fc2.{}",
    "encoder.norm.{}": "norm.{}",
    "head.{}": "head.{}",
}
HUGGING_FACE: Names = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.{}": "vit.embeddings.patch_embeddings.projection.{}",
    "encoder.layers.*.norm1.{}": "vit.layers.*.layernorm_before.{}",
    "encoder.layers.*.self_attention.in_proj.{}": (
        "vit.layers.*.attention.q_proj.{}",
        "vit.layers.*.attention.k_proj.{}",
        "vit.layers.*.attention.v_proj.{}",
    ),
    "encoder.layers.*.self_attention.out_proj.{}": "vit.layers.*.attention.o_proj.{}",
    "encoder.layers.*.norm2.{}": "vit.layers.*.layernorm_after.{}",
    "encoder.layers.*.feed_forward.linear1.{}": "vit.layers.*.mlp.fc1.{}",
    "encoder.layers.*.feed_forward.linear2.{}": "vit.layers.*.mlp.fc2.{}",
    "encoder.norm.{}": "vit.layernorm.{}",
    "head.{}": "classifier.{}",
}
# Before transformers 5, and in the files that it still writes.
HUGGING_FACE_OLD: Names = HUGGING_FACE | {
    "encoder.layers.*.norm1.{}": "vit.encoder.layer.*.layernorm_before.{}",
    "encoder.layers.*.self_attention.in_proj.{}": (
        "vit.encoder.layer.*.attention.attention.query.{}",
        "vit.encoder.layer.*.attention.attention.key.{}",
        "vit.encoder.layer.*.attention.attention.value.{}",
    ),
    "encoder.layers.*.self_attention.out_proj.{}": (
        "vit.encoder.layer.*.attention.output.dense.{}"
    ),
    "encoder.layers.*.norm2.{}": "vit.encoder.layer.*.layernorm_after.{}",
    "encoder.layers.*.feed_forward.linear1.{}": (
        "vit.encoder.layer.*.intermediate.dense.{}"
    ),
    "encoder.layers.*.feed_forward.linear2.{}": "vit.encoder.layer.*.output.dense.{}",
}


def from_torchvision(state_dict: StateDict) -> dict[str, Tensor]:
    """Rename the weights of a torchvision `VisionTransformer` for `minivit.ViT`.

    All sizes are read from the shapes, but for the number of heads: no shape shows it,
    so build the ViT with the right one. Tensors that need no change are not copied.

    Args:
        state_dict: of a `VisionTransformer`, also of the old form that torchvision's
            downloads have.

    Returns:
        What `ViT.load_state_dict` takes.

    Raises:
        TypeError: `state_dict` is no mapping.
        ValueError: it does not fit; lists every name that is missing or unexpected and
            every shape that is wrong.
    """
    return _to_minivit(state_dict, "torchvision", TORCHVISION, TORCHVISION_OLD)


def from_timm(state_dict: StateDict) -> dict[str, Tensor]:
    """Rename the weights of a timm `VisionTransformer` for `minivit.ViT`.

    Fits the plain models with class token (`vit_tiny_patch16_224`, `deit_…`), not
    those with registers, distillation token, layer scale or q/k norms. Tensors that
    need no change are not copied.

    Args:
        state_dict: of a `VisionTransformer`.

    Returns:
        What `ViT.load_state_dict` takes.

    Raises:
        TypeError: `state_dict` is no mapping.
        ValueError: as `from_torchvision`.
    """
    return _to_minivit(state_dict, "timm", TIMM)


def from_huggingface(state_dict: StateDict) -> dict[str, Tensor]:
    """Rename the weights of a `ViTForImageClassification` for `minivit.ViT`.

    Build the ViT with `norm_eps` as the model's `config.layer_norm_eps` (1e-12 unless
    somebody changed it). Tensors that need no change are not copied.

    Args:
        state_dict: of the model, or read from its `model.safetensors`, where names are
            those of transformers 4.

    Returns:
        What `ViT.load_state_dict` takes.

    Raises:
        TypeError: `state_dict` is no mapping.
        ValueError: as `from_torchvision`.
    """
    return _to_minivit(state_dict, "Hugging Face", HUGGING_FACE, HUGGING_FACE_OLD)


def to_torchvision(state_dict: StateDict) -> dict[str, Tensor]:
    """Rename the weights of a `minivit.ViT` for torchvision: undo `from_torchvision`.

    Args:
        state_dict: of a ViT with CLS token that reads images of three channels.

    Returns:
        What `VisionTransformer.load_state_dict` takes.

    Raises:
        TypeError: `state_dict` is no mapping.
        ValueError: as `from_torchvision`, or the patches do not have three channels.
    """
    _fitting_layout(state_dict, "minivit", MINIVIT)
    converted = {}
    names = _layout(TORCHVISION, _depth(MINIVIT, state_dict))
    for ours, tensor in state_dict.items():
        if ours == PATCHES.format("weight"):
            side = math.isqrt(tensor.size(1) // 3)
            if tensor.size(1) != 3 * side**2:
                raise ValueError(
                    f"{ours} has shape {tuple(tensor.shape)}, but torchvision needs "
                    f"patches of 3 · P² numbers: square, with three channels"
                )
            tensor = tensor.unflatten(1, (side, side, 3))  # (E, P, P, C)
            tensor = tensor.permute(0, 3, 1, 2).contiguous()  # (E, C, P, P)
        ((theirs,), _) = names[ours]
        converted[theirs] = tensor
    return converted


def _to_minivit(
    state_dict: StateDict, library: str, *variants: Names
) -> dict[str, Tensor]:
    converted = {}
    for ours, (theirs, _) in _fitting_layout(state_dict, library, *variants).items():
        parts = [state_dict[name] for name in theirs]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if ours == PATCHES.format("weight"):
            # A convolution runs through channel, row, column; a patch of ours
            # through row, column, channel.
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)  # (E, P·P·C)
        converted[ours] = tensor
    return converted


def _fitting_layout(state_dict: StateDict, library: str, *variants: Names) -> Layout:
    """Choose the variant that knows most of the names, and check that all is there."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"expected a state dict (model.state_dict()), "
            f"got {type(state_dict).__name__}"
        )
    layouts = [_layout(names, _depth(names, state_dict)) for names in variants]
    layout = max(layouts, key=lambda layout: len(_parts(layout).keys() & state_dict))
    _check(state_dict, library, _parts(layout))
    return layout


def _layout(names: Names, num_layers: int) -> Layout:
    """Write a table out: for each parameter of ours, its parts and their shape."""
    layout = {}
    for ours, theirs in names.items():
        shape = SHAPES[ours].split()
        if ours == PATCHES and names is not MINIVIT:
            shape = ["E", "C", "P", "P"]
        if isinstance(theirs, str):
            theirs = (theirs,)
        else:  # a third of it each
            shape = [letter.removeprefix("3") for letter in shape]
        for layer in map(str, range(num_layers if "*" in ours else 1)):
            for kind in ("weight", "bias") if "{}" in ours else ("",):
                layout[ours.replace("*", layer).format(kind)] = (
                    tuple(name.replace("*", layer).format(kind) for name in theirs),
                    shape[:1] if kind == "bias" else shape,
                )
    return layout


def _parts(layout: Layout) -> dict[str, list[str]]:
    return {name: shape for names, shape in layout.values() for name in names}


def _depth(names: Names, state_dict: StateDict) -> int:
    """Count the layers by the highest number that occurs in a name; one at least."""
    numbers = [0]
    prefix = re.escape(str(names["encoder.layers.*.norm1.{}"]).partition("*")[0])
    for name in state_dict:
        if match := re.match(prefix + r"(\d+)\.", str(name)):
            numbers.append(int(match[1]))
    # A number beyond the number of tensors is nonsense, not a depth.
    return min(max(numbers) + 1, len(state_dict) + 1)


def _check(
    state_dict: StateDict, library: str, expected: Mapping[str, list[str]]
) -> None:
    """Raise one error that names everything which does not fit."""
    sizes = _sizes(state_dict, expected)
    wrong = []
    for name, shape in expected.items():
        want = tuple(sizes.get(letter, letter) for letter in shape)
        if name in state_dict and _shape(state_dict[name]) != want:
            value = state_dict[name]
            came = _shape(value) if isinstance(value, Tensor) else type(value).__name__
            wrong.append(f"{name}: came {came}, expected {want}".replace("'", ""))
    problems = {
        "missing": [name for name in expected if name not in state_dict],
        "unexpected": [str(name) for name in state_dict if name not in expected],
        "wrong shape": wrong,
    }
    if any(problems.values()):
        lines = [
            f"these are not the weights of a plain ViT as {library} names them; "
            "nothing was converted"
        ]
        for problem, names in problems.items():
            if names:
                lines += [f"{problem} ({len(names)}):", *(f"  {n}" for n in names)]
        raise ValueError("\n".join(lines))


def _sizes(state_dict: StateDict, expected: Mapping[str, list[str]]) -> dict[str, int]:
    """Find what each letter means: the size on which most tensors agree."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, shape in expected.items():
        came = _shape(state_dict.get(name))
        if len(came) == len(shape):
            for letter, size in zip(shape, came):
                votes[letter][size] += 1
    sizes = {letter: count.most_common(1)[0][0] for letter, count in votes.items()}
    if "E" in sizes:
        sizes["3E"] = 3 * sizes["E"]
    return sizes | {"1": 1}


def _shape(value: object) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
