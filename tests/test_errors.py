"""Bad input is refused with a message that says what came and what was expected.

One row a mistake: what is called, the exception, and pieces of its message, the
numbers among them.
"""

import re
from functools import partial

import pytest
import torch
from models import SEQ2SEQ, seq2seq, vit
from torch import nn

import minivit
from minivit import (
    Decoder,
    DecoderLayer,
    DropPath,
    EncoderLayer,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    MultiHeadAttention,
    PatchEmbed,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    beam_search,
    causal_mask,
    data,
    greedy_search,
    padding_mask,
    patchify,
    plots,
    resample_positions,
    rotate,
    rotate_2d,
    sample,
    sinusoidal_positions,
    sinusoidal_positions_2d,
    train,
    unpatchify,
)
from minivit.attention import attention

IDS = {"bos_id": 1, "eos_id": 2, "max_len": 5}


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def ids(*shape, value=1):
    return torch.full(shape, value)


def see(q=(2, 3, 4), k=(2, 5, 4), v=(2, 5, 6), mask=None):
    return attention(zeros(*q), zeros(*k), zeros(*v), mask=mask)


def look(q=(2, 3, 8), k=(2, 5, 8), v=(2, 5, 8), mask=None, how="forward"):
    module = MultiHeadAttention(8, 2)
    return getattr(module, how)(zeros(*q), zeros(*k), zeros(*v), mask=mask)


def may(*shape, dtype=torch.bool):
    return torch.ones(*shape, dtype=dtype)


def write(search=greedy_search, src=None, **changes):
    return search(seq2seq(), ids(1, 4) if src is None else src, **{**IDS, **changes})


def translate(src=None, tgt=None):
    src = ids(1, 3) if src is None else src
    return seq2seq()(src, ids(1, 3) if tgt is None else tgt)


def learn(inputs=None, targets=None, model=None, **changes):
    inputs = torch.randn(6, 4) if inputs is None else inputs
    targets = torch.tensor([0, 1, 2, 0, 1, 2]) if targets is None else targets
    arguments = {"epochs": 1, "batch_size": 2, "progress": False, **changes}
    return train.fit(model or nn.Linear(4, 3), (inputs, targets), **arguments)


def broken():
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, NAN)
    return model


def judge(inputs=None, targets=None, **arguments):
    inputs = torch.randn(6, 4) if inputs is None else inputs
    targets = torch.tensor([0, 1, 2, 0, 1, 2]) if targets is None else targets
    return train.evaluate(nn.Linear(4, 3), (inputs, targets), **arguments)


def with_bad(value, *shape, at=(1, 2)):
    x = zeros(*shape)
    x[at] = value
    return x


NAN, INF = float("nan"), float("inf")
V, T = ValueError, TypeError

ATTENTION = [
    ("heads", lambda: MultiHeadAttention(100, 12), V, "embed_dim=100", "num_heads=12"),
    (
        "mask float",
        lambda: see(mask=may(3, 5, dtype=torch.float32)),
        T,
        "bool",
        "True = may look",
        "torch.float32",
    ),
    (
        "mask int",
        lambda: see(mask=may(3, 5, dtype=torch.long)),
        T,
        "bool",
        "torch.int64",
    ),
    ("causal 3 2", lambda: causal_mask(3, 2), V, "query_len=3", "key_len=2"),
    ("lengths float", lambda: padding_mask(zeros(2)), T, "integers", "float32"),
    (
        "lengths bool",
        lambda: padding_mask(may(2, 3)),
        T,
        "integers",
        "torch.bool",
    ),
    (
        "lengths complex",
        lambda: padding_mask(zeros(2, dtype=torch.complex64)),
        T,
        "integers",
        "complex64",
    ),
]
for how in ("forward", "attend"):
    ATTENTION += [
        (
            f"{how} {name}",
            partial(look, how=how, **a),
            *rest,
        )
        for name, a, *rest in [
            ("mask float", {"mask": may(3, 5, dtype=torch.float16)}, T, "bool", "16"),
            (
                "mask 3d",
                {"mask": may(2, 3, 5)},
                V,
                "(2, 3, 5)",
                "taken for the heads",
                "(B, 1, L, S)",
            ),
        ]
    ]

LAYERS = [
    (
        "activation",
        lambda: FeedForward(4, 8, activation="swish"),
        V,
        "'gelu', 'relu'",
        "'swish'",
    ),
    ("mlp dropout", lambda: FeedForward(4, 4, dropout=1.5), V, "dropout", "1.5"),
    ("drop path", lambda: DropPath(1.5), V, "between 0 and 1", "1.5"),
    ("drop path -1", lambda: DropPath(-0.5), V, "between 0 and 1", "-0.5"),
]

POSITIONS = [
    ("odd", lambda: sinusoidal_positions(3, 5), V, "even", "5"),
    ("2d width", lambda: sinusoidal_positions_2d(2, 2, 6), V, "embed_dim=6", "by 4"),
    ("rotate integers", lambda: rotate(torch.ones(2, 2).long()), T, "floating", "64"),
    ("rotate odd", lambda: rotate(zeros(2, 3)), V, "even", "3"),
    ("rotate positions", lambda: rotate(zeros(2, 4), zeros(3)), V, "(2,)", "(3,)"),
    ("rotate 2d width", lambda: rotate_2d(zeros(5, 6), 2), V, "by 4", "6"),
    (
        "rotate 2d grid",
        lambda: rotate_2d(zeros(6, 4), (2, 3)),
        V,
        "num_prefix_tokens=1",
        "2 x 3",
        "6 tokens",
    ),
    (
        "rotate 2d prefix",
        lambda: rotate_2d(zeros(3, 4), 2, num_prefix_tokens=-1),
        V,
        "num_prefix_tokens=-1",
    ),
    ("alibi heads", lambda: alibi_slopes(0), V, "num_heads", "0"),
    ("alibi keys", lambda: alibi_bias(2, 4, 3), V, "query_len=4", "key_len=3"),
    ("resample 2d", lambda: resample_positions(zeros(5, 4), 3), V, "(1, tok", "(5, 4)"),
    ("resample batch", lambda: resample_positions(zeros(2, 5, 4), 3), V, "(2, 5, 4)"),
    ("resample odd", lambda: resample_positions(zeros(1, 6, 4), 3), V, "5", "2 x 2"),
    (
        "resample old",
        lambda: resample_positions(zeros(1, 7, 4), 3, old_grid_size=(2, 4)),
        V,
        "6 patch",
        "2 x 4",
    ),
    ("resample none", lambda: resample_positions(zeros(1, 5, 4), (3, 0)), V, "3 x 0"),
    (
        "resample prefix",
        lambda: resample_positions(zeros(1, 5, 4), 3, num_prefix_tokens=5),
        V,
        "num_prefix_tokens=5",
        "5 tokens",
    ),
    (
        "resample prefix -1",
        lambda: resample_positions(zeros(1, 5, 4), 3, num_prefix_tokens=-1),
        V,
        "num_prefix_tokens=-1",
    ),
]
for table in (SinusoidalPositions, LearnedPositions):
    name = table.__name__
    POSITIONS += [
        (
            f"{name} {case}",
            partial(table(5, 4), x, start=start),
            V,
            *found,
        )
        for case, x, start, found in [
            ("long", zeros(1, 6, 4), 0, ("0 to 5", "max_len=5")),
            ("start", zeros(1, 3, 4), 3, ("3 to 5", "max_len=5")),
            ("before", zeros(1, 3, 4), -1, ("-1 to 1", "max_len=5")),
        ]
    ]

TRANSFORMER = [
    (
        f"{layer.__name__} heads",
        partial(layer, 10, 4, 8),
        V,
        "embed_dim=10",
        "num_heads=4",
    )
    for layer in (EncoderLayer, DecoderLayer)
]
TRANSFORMER += [
    (
        f"{layer.__name__} activation",
        partial(layer, 8, 4, 8, activation="tanh"),
        V,
        "'relu'",
        "'tanh'",
    )
    for layer in (EncoderLayer, DecoderLayer)
]
for name in ("src", "tgt"):
    size = SEQ2SEQ[f"{name}_vocab_size"]
    TRANSFORMER += [
        (
            f"{name} {case}",
            partial(translate, **{name: x}),
            error,
            *found,
        )
        for case, x, error, *found in [
            ("too high", ids(1, 3, value=size), V, f"to {size}", f"{size} tokens"),
            ("negative", ids(1, 3, value=-2), V, "from -2", f"{size} tokens"),
            ("long", ids(1, 11), V, "0 to 10", "max_len=10"),
        ]
    ]
TRANSFORMER += [
    ("heads", lambda: seq2seq(num_heads=3), V, "embed_dim=8", "num_heads=3"),
    ("odd width", lambda: seq2seq(embed_dim=9, num_heads=3), V, "even", "9"),
    ("activation", lambda: seq2seq(activation="elu"), V, "'gelu', 'relu'", "'elu'"),
    ("pad beyond", lambda: seq2seq(pad_id=9), V, "pad_id=9", "11 and 9 tokens"),
    ("pad negative", lambda: seq2seq(pad_id=-1), V, "pad_id=-1"),
    (
        "sharing",
        lambda: seq2seq(share_embeddings=True),
        V,
        "src_vocab_size=11",
        "tgt_vocab_size=9",
    ),
    (
        "memory mask",
        lambda: Decoder(8, 1, 2, 8)(
            zeros(1, 3, 8), zeros(1, 4, 8), memory_mask=zeros(1, 1, 1, 4)
        ),
        T,
        "bool",
        "torch.float32",
    ),
    (
        "torch's name for the mask",
        lambda: EncoderLayer(8, 2, 8)(zeros(1, 3, 8), src_key_padding_mask=may(1, 3)),
        T,
        "src_key_padding_mask",
    ),
]

GENERATE = []
for search in (greedy_search, sample, beam_search):
    name = search.__name__
    GENERATE += [
        (f"{name} {case}", partial(write, search, **a), V, *found)
        for case, a, *found in [
            ("max_len 0", {"max_len": 0}, "max_len", "between 1 and", "10", "got 0"),
            ("max_len 11", {"max_len": 11}, "model's 10", "got 11"),
            ("bos beyond", {"bos_id": 9}, "bos_id=9", "9 tokens"),
            ("eos beyond", {"eos_id": 9}, "eos_id=9", "9 tokens"),
            ("eos negative", {"eos_id": -1}, "eos_id=-1", "9 tokens"),
            ("bos is pad", {"bos_id": 0}, "bos_id=0", "pad_id=0"),
            ("eos is pad", {"eos_id": 0}, "eos_id=0", "pad_id=0"),
            ("source ids", {"src": ids(1, 4, value=11)}, "to 11", "11 tokens"),
        ]
    ]
GENERATE += [
    ("temperature", lambda: write(sample, temperature=0.0), V, "above 0", "0.0"),
    (
        "temperature inf",
        lambda: write(sample, temperature=float("inf")),
        V,
        "finite",
        "inf",
    ),
    ("temperature nan", lambda: write(sample, temperature=NAN), V, "above 0", "nan"),
    ("top_k", lambda: write(sample, top_k=0), V, "top_k", "at least 1", "0"),
    ("top_p 0", lambda: write(sample, top_p=0.0), V, "top_p", "(0, 1]", "0.0"),
    ("top_p 2", lambda: write(sample, top_p=1.5), V, "top_p", "(0, 1]", "1.5"),
    ("beams", lambda: write(beam_search, beam_size=0), V, "beam_size", "1", "0"),
    (
        "penalty",
        lambda: write(beam_search, length_penalty=-0.5),
        V,
        "length_penalty",
        "-0.5",
    ),
    ("penalty nan", lambda: write(beam_search, length_penalty=NAN), V, "nan"),
]

IMAGES = [
    ("patchify width", lambda: patchify(zeros(1, 3, 8, 9), 4), V, "8 x 9", "_size=4"),
    ("patchify height", lambda: patchify(zeros(1, 3, 6, 8), 4), V, "6 x 8", "_size=4"),
    ("un size", lambda: unpatchify(zeros(1, 4, 16), 4, 9), V, "9 x 9", "patch_size=4"),
    (
        "embed size",
        lambda: PatchEmbed(image_size=30, patch_size=4, embed_dim=8),
        V,
        "30 x 30",
        "patch_size=4",
    ),
    ("size", lambda: vit(image_size=(8, 10)), V, "8 x 10", "patch_size=4"),
    ("patch", lambda: vit(patch_size=5), V, "8 x 12", "patch_size=5"),
    ("b16", lambda: minivit.vit_b_16(image_size=100), V, "100 x 100", "patch_size=16"),
    ("heads", lambda: vit(num_heads=3), V, "embed_dim=8", "num_heads=3"),
    ("dropout", lambda: vit(dropout=1.5), V, "dropout", "1.5"),
    ("drop path", lambda: vit(num_layers=2, drop_path=1.5), V, "and 1", "1.5"),
    ("pool", lambda: vit(pool="max"), V, "'cls' or 'mean'", "'max'"),
    ("channels", lambda: vit()(zeros(1, 3, 8, 12)), V, "2, 8, 12", "(1, 3, 8, 12)"),
    ("other size", lambda: vit()(zeros(1, 2, 12, 8)), V, "2, 8, 12", "(1, 2, 12, 8)"),
    ("one image", lambda: vit()(zeros(2, 8, 12)), V, "(B, 2", "(2, 8, 12)"),
    ("features", lambda: vit().features(zeros(1, 1, 8, 12)), V, "(1, 1, 8, 12)"),
    (
        "bytes",
        lambda: vit()(zeros(1, 2, 8, 12, dtype=torch.uint8)),
        T,
        "floats",
        "torch.uint8",
    ),
]

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
DATA = [
    ("photograph", lambda: data.load_photograph("cat"), V, "china", "flower", "'cat'"),
    ("split", lambda: data.split(zeros(6, 2), LABELS[:5]), V, "6 images", "5 labels"),
    ("split share", lambda: data.split(zeros(6, 2), LABELS, val_size=1.5), V, "1.5"),
    ("split all", lambda: data.split(zeros(6, 2), LABELS, val_size=6), V, "6"),
    (
        "split nan",
        lambda: data.split(with_bad(NAN, 6, 3), LABELS),
        V,
        "1 of 18",
        "NaN",
        "(1, 2)",
    ),
    ("no dates", lambda: data.date_pairs(0, 5), V, "at least 1", "0 and 5"),
    ("no test dates", lambda: data.date_pairs(5, 0), V, "at least 1", "5 and 0"),
    ("all dates", lambda: data.date_pairs(10**5, 1), V, "73049", "100000 and 1"),
    ("no text", lambda: data.Characters("ab").encode([]), V, "no text"),
    ("character", lambda: data.Characters("ab").encode(["abxy"]), V, "'x', 'y'"),
    ("finite", lambda: data.check_finite(with_bad(INF, 2, 3)), V, "1 of 6", "(1, 2)"),
    ("-inf", lambda: data.check_finite(with_bad(-INF, 2, 3)), V, "1 of 6", "(1, 2)"),
]

TRAIN = [
    ("epochs", lambda: learn(epochs=0), V, "epochs", "0 and 2"),
    ("batch size", lambda: learn(batch_size=0), V, "batch_size", "1 and 0"),
    ("warm-up", lambda: learn(warmup_ratio=1.0), V, "[0, 1)", "1.0"),
    ("warm-up -1", lambda: train.warmup_cosine(0, 5, -0.1), V, "[0, 1)", "-0.1"),
    ("smoothing", lambda: learn(label_smoothing=1.5), V, "[0, 1)", "1.5"),
    ("learning rate", lambda: learn(lr=-1.0), V, "learning rate", "-1.0"),
    ("lengths", lambda: learn(targets=LABELS[:4]), V, "train", "[6, 4]"),
    ("validation", lambda: learn(val=(zeros(2, 4), LABELS)), V, "[2, 6]"),
    ("no data", lambda: learn(zeros(0, 4), LABELS[:0]), V, "above zero", "[0, 0]"),
    ("nan", lambda: learn(with_bad(NAN, 6, 4)), V, "1 of 24", "(1, 2)"),
    ("infinite", lambda: learn(with_bad(INF, 6, 4)), V, "1 of 24", "(1, 2)"),
    (
        "no targets",
        lambda: train.fit(nn.Linear(4, 3), (zeros(2, 4),), epochs=1),
        V,
        "inputs and targets",
        "[2]",
    ),
    (
        "frozen",
        lambda: learn(model=nn.Linear(4, 3).requires_grad_(False)),
        V,
        "no parameter that requires a gradient",
    ),
    (
        "diverged",
        lambda: learn(model=broken()),
        V,
        "the loss is nan",
        "epoch 1",
        "lr=0.001",
    ),
    ("all ignored", lambda: learn(targets=ids(6, value=-100)), V, "-100"),
    ("judge nan", lambda: judge(with_bad(NAN, 6, 4)), V, "1 of 24", "(1, 2)"),
    ("judge lengths", lambda: judge(targets=LABELS[:3]), V, "data", "[6, 3]"),
    ("judge empty", lambda: judge(zeros(0, 4), LABELS[:0]), V, "[0, 0]"),
    ("judge batch", lambda: judge(batch_size=0), V, "batch_size", "1", "0"),
    ("judge ignored", lambda: judge(targets=ids(6, value=-100)), V, "-100"),
]

PLOTS = [
    ("image dims", lambda: plots.images(zeros(1, 8, 8)), V, "(batch", "(1, 8, 8)"),
    ("channels", lambda: plots.images(zeros(2, 2, 8, 8)), V, "1 or 3", "(2, 2, 8, 8)"),
    ("no images", lambda: plots.images(zeros(0, 1, 8, 8)), V, "(0, 1, 8, 8)"),
    (
        "titles",
        lambda: plots.images(zeros(2, 1, 8, 8), titles=["a"]),
        V,
        "2 images",
        "1 titles",
    ),
    ("history", lambda: plots.learning_curves({"loss": [1]}), V, "epoch", "'loss'"),
    ("heat dims", lambda: plots.heatmap(zeros(1, 2, 3)), V, "(L, S)", "(1, 2, 3)"),
    ("rows", lambda: plots.heatmap(zeros(2, 3), rows="abc"), V, "2 rows", "3 labels"),
    ("columns", lambda: plots.heatmap(zeros(2, 3), columns="ab"), V, "3 columns", "2"),
    ("maps", lambda: plots.attention_heads(zeros(2, 3)), V, "(H, L, S)", "(2, 3)"),
    (
        "map titles",
        lambda: plots.attention_heads(zeros(2, 3, 3), titles=["a"]),
        V,
        "2 maps",
        "1 titles",
    ),
    (
        "confusion",
        lambda: plots.confusion_matrix(ids(2), ids(3)),
        V,
        "(B,)",
        "(2,)",
        "(3,)",
    ),
]

TABLE = {
    "attention": ATTENTION,
    "layers": LAYERS,
    "positions": POSITIONS,
    "transformer": TRANSFORMER,
    "generate": GENERATE,
    "vit": IMAGES,
    "data": DATA,
    "train": TRAIN,
    "plots": PLOTS,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{module}-{row[0]}")
        for module, rows in TABLE.items()
        for row in rows
    ],
)
def test_bad_input_is_refused_with_the_numbers(row):
    _, call, error, *pieces = row
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for piece in pieces:  # a bare number must not be part of another one
        bounded = rf"(?<!\d){re.escape(piece)}(?!\d)"
        assert re.search(bounded, message), f"{piece!r} is not in {message!r}"


# Shapes that do not fit need no words of ours: torch says what it cannot multiply.
REFUSED_BY_TORCH = {
    "attention, widths": lambda: see(q=(2, 3, 5)),
    "attention, lengths": lambda: see(v=(2, 4, 6)),
    "attention, batches": lambda: see(k=(3, 5, 4), v=(3, 5, 6)),
    "attention, mask": lambda: see(mask=may(5, 3)),
    "width of queries": lambda: look(q=(2, 3, 6)),
    "width of keys": lambda: look(k=(2, 5, 7)),
    "batches": lambda: look(k=(3, 5, 8), v=(3, 5, 8)),
    "mask": lambda: look(mask=may(3, 4)),
    "nothing in the cache": lambda: MultiHeadAttention(8, 2)(
        zeros(1, 3, 8), None, None, cache={}
    ),
    "width of a norm": lambda: LayerNorm(4)(zeros(2, 3)),
    "width of positions": lambda: SinusoidalPositions(5, 4)(zeros(1, 3, 6)),
    "width of the memory": lambda: DecoderLayer(8, 2, 8)(
        zeros(1, 3, 8), zeros(1, 4, 6)
    ),
    "ids that are floats": lambda: translate(src=zeros(1, 3)),
    "ids that are bool": lambda: translate(tgt=may(1, 3)),
    "ids without a batch": lambda: translate(src=ids(3)),
    "batches of ids": lambda: seq2seq()(ids(2, 3), ids(3, 3)),
    "patches of no image": lambda: unpatchify(zeros(1, 5, 16), 4, 8),
    "patches of no pixels": lambda: unpatchify(zeros(1, 4, 18), 4, 8),
    "one image": lambda: patchify(zeros(3, 8, 8), 4),
    "patches of size 0": lambda: patchify(zeros(1, 3, 8, 8), 0),
    "no heads": lambda: MultiHeadAttention(8, 0),
}


@pytest.mark.parametrize("case", REFUSED_BY_TORCH)
def test_torch_refuses_the_rest(case):
    """Not one of these may give an answer."""
    with pytest.raises(
        (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError)
    ):
        REFUSED_BY_TORCH[case]()


def test_nothing_in_nothing_out():
    """An empty batch is no mistake; an empty source is one that nobody looks at."""
    assert vit()(zeros(0, 2, 8, 12)).shape == (0, 3)
    assert seq2seq()(ids(0, 3), ids(0, 2)).shape == (0, 2, 9)
    assert look(k=(2, 0, 8), v=(2, 0, 8)).isfinite().all()
    assert look(q=(0, 3, 8), k=(0, 5, 8), v=(0, 5, 8)).shape == (0, 3, 8)


def test_rows_of_the_table_differ():
    for module, rows in TABLE.items():
        names = [row[0] for row in rows]
        assert len(set(names)) == len(names), module


def test_the_same_calls_without_the_mistakes_succeed():
    """The helpers above must not fail for reasons of their own."""
    see(mask=may(2, 3, 5))
    for how in ("forward", "attend"):
        look(mask=may(2, 1, 3, 5), how=how)
    seq2seq()(ids(1, 3), ids(1, 3))
    for search in (greedy_search, sample, beam_search):
        write(search)
    vit()(zeros(1, 2, 8, 12))
    learn()
    judge()
    data.split(zeros(6, 2), LABELS, val_size=3)
    plots.heatmap(zeros(2, 3), rows="ab", columns="abc")
