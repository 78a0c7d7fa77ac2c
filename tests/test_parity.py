"""Every module against somebody else's: same weights, same outputs and gradients.

A reference's weights are renamed, loaded with `strict=True` (so that none is left
over) and its gradients are renamed in the same way before they are compared. With
dropout, both draw from the same seed: the random numbers must be used in the same
places and the same order too.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from models import randomise
from torch import nn

import minivit
from minivit import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    LayerNorm,
    MultiHeadAttention,
    Transformer,
    ViT,
    causal_mask,
    padding_mask,
)
from minivit.attention import attention

B, L, S, E, H = 3, 5, 7, 16, 4
MLP = 24
SINGLE, DOUBLE = torch.float32, torch.float64
MODES = [("eval", 0.0), ("eval", 0.4), ("train", 0.0), ("train", 0.4)]
each_dtype = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["f32", "f64"])
each_mode = pytest.mark.parametrize(
    ("mode", "dropout"), MODES, ids=[f"{m}-{d}" for m, d in MODES]
)
each_order = pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
each_activation = pytest.mark.parametrize("activation", ["relu", "gelu"])


def close(ours, theirs, tolerance, name="output"):
    torch.testing.assert_close(
        ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}"
    )


@pytest.fixture(autouse=True)
def same_dropout(monkeypatch):
    """Draw dropout in the order of the indices, however a tensor lies in memory.

    torch's modules hand on transposed views, for which `F.dropout` would draw the same
    random numbers in another order.
    """

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0.0:
            return x
        return x * (torch.rand(x.shape, dtype=x.dtype) >= p) / (1.0 - p)

    monkeypatch.setattr(F, "dropout", dropout)


def leaves(*shapes, dtype):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def compare(ours, theirs, inputs, call_ours, call_theirs, rename, *, mode, tolerance):
    """Hold outputs, and gradients of inputs and parameters, against each other."""
    results = []
    for module, call in ((ours, call_ours), (theirs, call_theirs)):
        module.train(mode == "train")
        module.zero_grad()
        copies = [x.detach().clone().requires_grad_() for x in inputs]
        torch.manual_seed(7)
        output = call(module, *copies)
        torch.manual_seed(8)
        direction = torch.randn(output.shape, dtype=output.dtype)
        (output * direction).sum().div(output.numel() ** 0.5).backward()
        results.append((output.detach(), [x.grad for x in copies]))
    (our_output, our_grads), (their_output, their_grads) = results
    assert their_output.isfinite().all(), "the reference defines no result here"
    close(our_output, their_output, tolerance)
    for i, (a, b) in enumerate(zip(our_grads, their_grads, strict=True)):
        assert b.abs().max() > 1e-3, "a gradient that vanishes would compare nothing"
        close(a, b, tolerance, f"gradient of input {i}")
    expected = rename({k: p.grad for k, p in theirs.named_parameters()})
    found = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient, tolerance, f"gradient of {name}")


# --- attention ----------------------------------------------------------------------


def some_hidden_rows():
    """(B, H, L, S) at random; some queries may look nowhere."""
    mask = torch.rand(B, H, L, S) < 0.6
    mask[0, :, 1] = False
    mask[1, 2] = False
    return mask


ATTENTION_MASKS = {
    "none": lambda: None,
    "causal": lambda: causal_mask(L, S),
    "padding": lambda: padding_mask(torch.tensor([S, 1, 4]), S),
    "both": lambda: causal_mask(L, S) & padding_mask(torch.tensor([S, 3, 4]), S),
    "random": some_hidden_rows,
    "one sequence hidden": lambda: padding_mask(torch.tensor([S, 0, 4]), S),
}
each_mask = pytest.mark.parametrize("mask_name", ATTENTION_MASKS)


@each_dtype
@each_mask
@pytest.mark.parametrize("value_dim", [8, 6])
def test_attention(dtype, mask_name, value_dim):
    tolerance = {SINGLE: 1e-6, DOUBLE: 1e-12}[dtype]
    mask = ATTENTION_MASKS[mask_name]()
    inputs = leaves((B, H, L, 8), (B, H, S, 8), (B, H, S, value_dim), dtype=dtype)
    ours, weights = attention(*inputs, mask=mask)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    assert theirs.isfinite().all()
    close(ours, theirs, tolerance)
    close(weights @ inputs[2], theirs, tolerance)
    direction = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad((ours * direction).sum(), inputs),
        torch.autograd.grad((theirs * direction).sum(), inputs),
        strict=True,
    ):
        assert b.abs().max() > 1e-3
        close(a, b, tolerance, "gradient")


def rename_attention(state):
    return {k.replace("in_proj_", "in_proj."): v for k, v in state.items()}


def their_masks(name):
    """The same masks as `ATTENTION_MASKS`, in the opposite sense: True = hidden."""
    hidden = ATTENTION_MASKS[name]()
    if hidden is None:
        return None, {}
    hidden = ~hidden
    if name in ("padding", "one sequence hidden"):
        return ~hidden, {"key_padding_mask": hidden[:, 0, 0]}
    if name == "both":
        padding = ~padding_mask(torch.tensor([S, 3, 4]), S)[:, 0, 0]
        causal = ~causal_mask(L, S)
        return ~hidden, {"attn_mask": causal, "key_padding_mask": padding}
    if hidden.dim() == 2:
        return ~hidden, {"attn_mask": hidden}
    return ~hidden, {"attn_mask": hidden.flatten(0, 1)}  # (B·H, L, S)


@each_dtype
@each_mode
@each_mask
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_multi_head_attention_across(dtype, mode, dropout, mask_name, bias):
    theirs = randomise(
        nn.MultiheadAttention(
            E, H, dropout=dropout, bias=bias, batch_first=True, dtype=dtype
        )
    )
    ours = MultiHeadAttention(E, H, dropout=dropout, bias=bias).to(dtype)
    ours.load_state_dict(rename_attention(theirs.state_dict()))
    mask, masks = their_masks(mask_name)
    compare(
        ours,
        theirs,
        leaves((B, L, E), (B, S, E), (B, S, E), dtype=dtype),
        lambda module, q, k, v: module(q, k, v, mask=mask),
        lambda module, q, k, v: module(q, k, v, need_weights=False, **masks)[0],
        rename_attention,
        mode=mode,
        tolerance={SINGLE: 1e-5, DOUBLE: 1e-12}[dtype],
    )


@each_dtype
@each_mode
@pytest.mark.parametrize("masked", ["none", "causal", "padding", "both"])
def test_multi_head_attention_to_itself(dtype, mode, dropout, masked):
    theirs = randomise(
        nn.MultiheadAttention(E, H, dropout=dropout, batch_first=True, dtype=dtype)
    )
    ours = MultiHeadAttention(E, H, dropout=dropout).to(dtype)
    ours.load_state_dict(rename_attention(theirs.state_dict()))
    lengths = torch.tensor([L, 2, 4])
    mask, masks = None, {}
    if masked in ("causal", "both"):
        mask, masks = causal_mask(L), {"attn_mask": ~causal_mask(L)}
    if masked in ("padding", "both"):
        padding = padding_mask(lengths, L)
        masks["key_padding_mask"] = ~padding[:, 0, 0]
        mask = padding if mask is None else mask & padding
    compare(
        ours,
        theirs,
        leaves((B, L, E), dtype=dtype),
        lambda module, x: module(x, x, x, mask=mask),
        lambda module, x: module(x, x, x, need_weights=False, **masks)[0],
        rename_attention,
        mode=mode,
        tolerance={SINGLE: 1e-5, DOUBLE: 1e-12}[dtype],
    )


@each_dtype
@pytest.mark.parametrize("mask_name", ["none", "causal", "padding", "both"])
def test_attend_shows_the_weights_of_torch(dtype, mask_name):
    theirs = randomise(nn.MultiheadAttention(E, H, batch_first=True, dtype=dtype))
    ours = MultiHeadAttention(E, H).to(dtype)
    ours.load_state_dict(rename_attention(theirs.state_dict()))
    mask, masks = their_masks(mask_name)
    inputs = leaves((B, L, E), (B, S, E), (B, S, E), dtype=dtype)
    found = ours.attend(*inputs, mask=mask)
    expected = theirs(*inputs, average_attn_weights=False, **masks)
    for name, a, b in zip(("output", "weights"), found, expected, strict=True):
        close(a, b, {SINGLE: 1e-5, DOUBLE: 1e-12}[dtype], name)


# --- layers ---------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
@pytest.mark.parametrize("method", ["forward", "explain"])
def test_layer_norm(dtype, eps, method):
    theirs = randomise(nn.LayerNorm(E, eps=eps, dtype=dtype))
    ours = LayerNorm(E, eps=eps).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    compare(
        ours,
        theirs,
        leaves((B, L, E), dtype=dtype),
        lambda module, x: getattr(module, method)(x),
        lambda module, x: module(x),
        lambda state: state,
        mode="train",
        tolerance={SINGLE: 1e-6, DOUBLE: 1e-12}[dtype],
    )


def rename_layers(state):
    """From the names of torch.nn.Transformer and its parts to ours."""
    return {
        re.sub(r"(linear[12]\.)", r"feed_forward.\1", k)
        .replace("self_attn.", "self_attention.")
        .replace("multihead_attn.", "cross_attention.")
        .replace("in_proj_", "in_proj."): v
        for k, v in state.items()
    }


LAYER_TOLERANCE = {SINGLE: 1e-5, DOUBLE: 1e-12}
PADDING = padding_mask(torch.tensor([S, 2, 4]), S)  # (B, 1, 1, S)
MASKS = {  # ours, theirs
    "none": (None, {}),
    "causal": (causal_mask(S), {"src_mask": ~causal_mask(S)}),
    "padding": (PADDING, {"src_key_padding_mask": ~PADDING[:, 0, 0]}),
    "both": (
        PADDING & causal_mask(S),
        {
            "src_mask": ~causal_mask(S),
            "src_key_padding_mask": ~PADDING[:, 0, 0],
        },
    ),
}
each_encoder_mask = pytest.mark.parametrize("mask_name", MASKS)


@each_dtype
@each_mode
@each_order
@each_activation
@each_encoder_mask
def test_encoder_layer(dtype, mode, dropout, norm_first, activation, mask_name):
    theirs = randomise(
        nn.TransformerEncoderLayer(
            E,
            H,
            MLP,
            dropout=dropout,
            activation=activation,
            norm_first=norm_first,
            batch_first=True,
            dtype=dtype,
        )
    )
    ours = EncoderLayer(
        E, H, MLP, dropout=dropout, activation=activation, norm_first=norm_first
    ).to(dtype)
    ours.load_state_dict(rename_layers(theirs.state_dict()))
    mask, masks = MASKS[mask_name]
    compare(
        ours,
        theirs,
        leaves((B, S, E), dtype=dtype),
        lambda module, x: module(x, mask=mask),
        lambda module, x: module(x, **masks),
        rename_layers,
        mode=mode,
        tolerance=LAYER_TOLERANCE[dtype],
    )


def decoder_masks(masked):
    if not masked:
        return {}, {}
    tgt = padding_mask(torch.tensor([L, 2, 4]), L)
    return (
        {"mask": causal_mask(L) & tgt, "memory_mask": PADDING},
        {
            "tgt_mask": ~causal_mask(L),
            "tgt_key_padding_mask": ~tgt[:, 0, 0],
            "memory_key_padding_mask": ~PADDING[:, 0, 0],
        },
    )


each_masked = pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])


@each_dtype
@each_mode
@each_order
@each_activation
@each_masked
def test_decoder_layer(dtype, mode, dropout, norm_first, activation, masked):
    theirs = randomise(
        nn.TransformerDecoderLayer(
            E,
            H,
            MLP,
            dropout=dropout,
            activation=activation,
            norm_first=norm_first,
            batch_first=True,
            dtype=dtype,
        )
    )
    ours = DecoderLayer(
        E, H, MLP, dropout=dropout, activation=activation, norm_first=norm_first
    ).to(dtype)
    ours.load_state_dict(rename_layers(theirs.state_dict()))
    our_masks, torch_masks = decoder_masks(masked)
    compare(
        ours,
        theirs,
        leaves((B, L, E), (B, S, E), dtype=dtype),
        lambda module, x, memory: module(x, memory, **our_masks),
        lambda module, x, memory: module(x, memory, **torch_masks),
        rename_layers,
        mode=mode,
        tolerance=LAYER_TOLERANCE[dtype],
    )


# --- stacks ---------------------------------------------------------------------


@each_dtype
@each_mode
@each_order
@pytest.mark.parametrize("final_norm", [True, False], ids=["norm", "no-norm"])
def test_encoder(dtype, mode, dropout, norm_first, final_norm):
    layer = nn.TransformerEncoderLayer(
        E, H, MLP, dropout=dropout, norm_first=norm_first, batch_first=True
    )
    norm = nn.LayerNorm(E) if final_norm else None
    theirs = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)
    theirs = randomise(theirs.to(dtype))
    ours = Encoder(
        E,
        2,
        H,
        MLP,
        dropout=dropout,
        norm_first=norm_first,
        final_norm=final_norm,
    ).to(dtype)
    ours.load_state_dict(rename_layers(theirs.state_dict()))
    compare(
        ours,
        theirs,
        leaves((B, S, E), dtype=dtype),
        lambda module, x: module(x, mask=PADDING & causal_mask(S)),
        lambda module, x: module(
            x, mask=~causal_mask(S), src_key_padding_mask=~PADDING[:, 0, 0]
        ),
        rename_layers,
        mode=mode,
        tolerance=LAYER_TOLERANCE[dtype],
    )


@each_dtype
@each_mode
@each_order
@pytest.mark.parametrize("final_norm", [True, False], ids=["norm", "no-norm"])
def test_decoder(dtype, mode, dropout, norm_first, final_norm):
    layer = nn.TransformerDecoderLayer(
        E, H, MLP, dropout=dropout, norm_first=norm_first, batch_first=True
    )
    norm = nn.LayerNorm(E) if final_norm else None
    theirs = randomise(nn.TransformerDecoder(layer, 2, norm=norm).to(dtype))
    ours = Decoder(
        E,
        2,
        H,
        MLP,
        dropout=dropout,
        norm_first=norm_first,
        final_norm=final_norm,
    ).to(dtype)
    ours.load_state_dict(rename_layers(theirs.state_dict()))
    our_masks, torch_masks = decoder_masks(True)
    compare(
        ours,
        theirs,
        leaves((B, L, E), (B, S, E), dtype=dtype),
        lambda module, x, memory: module(x, memory, **our_masks),
        lambda module, x, memory: module(x, memory, **torch_masks),
        rename_layers,
        mode=mode,
        tolerance=LAYER_TOLERANCE[dtype],
    )


@pytest.mark.parametrize("norm_first", [True, False])
def test_stacks_end_with_a_norm_exactly_when_pre_norm_leaves_them_without(norm_first):
    for stack in (Encoder, Decoder):
        norm = stack(E, 1, H, MLP, norm_first=norm_first).norm
        assert isinstance(norm, LayerNorm) == norm_first


class Body(nn.Module):
    """What is left of a `Transformer` without embeddings and head."""

    def __init__(self, model):
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder

    def forward(self, src, tgt, *, src_mask, mask, memory_mask):
        memory = self.encoder(src, mask=src_mask)
        return self.decoder(tgt, memory, mask=mask, memory_mask=memory_mask)


@each_dtype
@each_mode
@each_order
@each_activation
@each_masked
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_body(dtype, mode, dropout, norm_first, activation, masked):
    theirs = randomise(
        nn.Transformer(
            E,
            H,
            2,
            2,
            MLP,
            dropout=dropout,
            activation=activation,
            norm_first=norm_first,
            batch_first=True,
            dtype=dtype,
        )
    )
    ours = Body(
        Transformer(
            src_vocab_size=9,
            tgt_vocab_size=9,
            embed_dim=E,
            num_heads=H,
            num_layers=2,
            mlp_dim=MLP,
            dropout=dropout,
            activation=activation,
            norm_first=norm_first,
            final_norm=True,  # torch has it after both stacks in any case
        )
    ).to(dtype)
    ours.load_state_dict(rename_layers(theirs.state_dict()))
    our_masks, torch_masks = decoder_masks(masked)
    our_masks = {"mask": None, "memory_mask": None, **our_masks, "src_mask": None}
    if masked:
        our_masks["src_mask"] = PADDING
        torch_masks["src_key_padding_mask"] = ~PADDING[:, 0, 0]
    compare(
        ours,
        theirs,
        leaves((B, S, E), (B, L, E), dtype=dtype),
        lambda module, src, tgt: module(src, tgt, **our_masks),
        lambda module, src, tgt: module(src, tgt, **torch_masks),
        rename_layers,
        mode=mode,
        tolerance=LAYER_TOLERANCE[dtype],
    )


@each_dtype
@each_order
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_with_its_embeddings(dtype, norm_first):
    """The whole model is the body between two embeddings and a tied output layer."""
    model = Transformer(
        src_vocab_size=11,
        tgt_vocab_size=13,
        embed_dim=E,
        num_heads=H,
        num_layers=2,
        mlp_dim=MLP,
        norm_first=norm_first,
        final_norm=True,
        max_len=S,
    ).to(dtype)
    randomise(model).eval()
    body = nn.Transformer(
        E, H, 2, 2, MLP, norm_first=norm_first, batch_first=True, dtype=dtype
    ).eval()
    theirs = {k: v for k, v in model.state_dict().items()}
    body.load_state_dict(
        {k: theirs[new] for k in body.state_dict() for new in rename_layers({k: 0})}
    )
    src, tgt = torch.randint(1, 11, (B, S)), torch.randint(1, 13, (B, L))
    src[1, 4:] = tgt[2, 3:] = 0
    positions = minivit.sinusoidal_positions(S, E).to(dtype)
    embed = lambda table, ids: table.weight[ids] * E**0.5 + positions[: ids.size(1)]  # noqa: E731
    hidden = body(
        embed(model.src_embed, src),
        embed(model.tgt_embed, tgt),
        tgt_mask=~causal_mask(L),
        src_key_padding_mask=src == 0,
        memory_key_padding_mask=src == 0,
        tgt_key_padding_mask=tgt == 0,
    )
    expected = hidden @ model.tgt_embed.weight.T
    close(model(src, tgt), expected, {SINGLE: 5e-5, DOUBLE: 1e-12}[dtype])


# --- Vision Transformer -------------------------------------------------------------


def rename_vit(state):
    """From the names of torchvision's VisionTransformer to ours.

    Its convolution has the kernel (E, C, P, P); our patches are flattened in the
    order row, column, channel.
    """
    names = [
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.ln\.", "encoder.norm."),
        (r"^heads\.head\.", "head."),
        (r"\.layers\.encoder_layer_(\d+)\.", r".layers.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.mlp\.0\.", ".feed_forward.linear1."),
        (r"\.mlp\.3\.", ".feed_forward.linear2."),
        (r"\.in_proj_", ".in_proj."),
    ]
    renamed = {}
    for name, value in state.items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        if name == "patch_embed.proj.weight":
            value = value.permute(0, 2, 3, 1).flatten(1)  # (E, P·P·C)
        renamed[name] = value
    return renamed


@each_dtype
@each_mode
def test_vit(dtype, mode, dropout):
    from torchvision.models import VisionTransformer

    theirs = VisionTransformer(
        image_size=24,
        patch_size=8,
        num_layers=3,
        num_heads=H,
        hidden_dim=E,
        mlp_dim=MLP,
        dropout=dropout,
        attention_dropout=dropout,
        num_classes=6,
    )
    theirs = randomise(theirs).to(dtype)
    ours = ViT(
        image_size=24,
        patch_size=8,
        num_classes=6,
        embed_dim=E,
        num_layers=3,
        num_heads=H,
        mlp_dim=MLP,
        dropout=dropout,
    ).to(dtype)
    ours.load_state_dict(rename_vit(theirs.state_dict()))
    compare(
        ours,
        theirs,
        leaves((B, 3, 24, 24), dtype=dtype),
        lambda module, images: module(images),
        lambda module, images: module(images),
        rename_vit,
        mode=mode,
        tolerance={SINGLE: 1e-5, DOUBLE: 1e-10}[dtype],
    )


def test_vit_b_16():
    from torchvision.models import vit_b_16

    with torch.device("meta"):  # the weights come from the reference in any case
        ours = minivit.vit_b_16()
        theirs = vit_b_16()
    assert sum(p.numel() for p in ours.parameters()) == 86_567_656
    theirs.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(std=0.02)
            if ".ln" in name and name.endswith("weight"):
                parameter.add_(1.0)
    ours.load_state_dict(rename_vit(theirs.state_dict()), assign=True)
    compare(
        ours,
        theirs,
        leaves((1, 3, 224, 224), dtype=SINGLE),
        lambda module, images: module(images),
        lambda module, images: module(images),
        rename_vit,
        mode="eval",
        tolerance=1e-4,
    )


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16"])
def test_sizes_are_those_of_torchvision(name):
    import torchvision.models

    with torch.device("meta"):
        ours = getattr(minivit, name)()
        theirs = getattr(torchvision.models, name)()
    found = {k: v.shape for k, v in ours.state_dict().items()}
    assert found == {k: v.shape for k, v in rename_vit(theirs.state_dict()).items()}
