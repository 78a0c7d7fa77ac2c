"""Generation against slow, plain programs that do the same."""

import itertools
import math

import pytest
import torch
from torch import nn

from minivit import (
    Transformer,
    beam_search,
    causal_mask,
    generation,
    greedy_search,
    sample,
)

PAD, BOS, EOS = 0, 1, 2


def translator(seed=0, vocab=7, scale=0.2, **changes):
    torch.manual_seed(seed)
    arguments = {
        "src_vocab_size": 9,
        "tgt_vocab_size": vocab,
        "embed_dim": 8,
        "num_heads": 2,
        "num_layers": 2,
        "mlp_dim": 12,
        "dropout": 0.3,
        "max_len": 12,
        "norm_first": seed % 2 == 1,
        "tie_embeddings": False,  # or the same word would follow again and again
    }
    model = Transformer(**{**arguments, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def sources(batch=4, length=5):
    src = torch.randint(1, 9, (batch, length))
    src[0, 3:] = PAD
    return src


class Script(nn.Module):
    """A model whose next-token probabilities are a function of what is written."""

    pad_id, max_len = PAD, 50

    def __init__(self, rule, vocab):
        super().__init__()
        self.rule, self.tgt_vocab_size, self.calls = rule, vocab, 0

    def encode(self, src):
        return src[..., None].float()

    def new_cache(self):
        return []

    def decode(self, tgt, memory, src, *, cache=None):
        self.calls += 1
        rows = [
            self.rule(int(row), tuple(ids[1:]))
            for row, ids in zip(src[:, 0], tgt.tolist(), strict=True)
        ]
        return torch.tensor(rows).log()[:, None]  # (B, 1, V)


def rows(batch):
    return torch.arange(batch)[:, None]


def one_hot(token, vocab=6):
    """Nearly certain: the logarithm of zero would hide ties."""
    return [1.0 if i == token else 1e-6 for i in range(vocab)]


def by_script(*scripts):
    """Each row of the batch writes its own script."""
    return Script(
        lambda row, written: one_hot((*scripts[row], *[EOS] * 20)[len(written)]), 6
    )


# --- greedy -------------------------------------------------------------------------


def greedy_by_hand(model, src, max_len):
    """One sequence at a time, everything computed anew at each step."""
    found = []
    for i in range(len(src)):
        written = [BOS]
        while len(written) <= max_len and written[-1] != EOS:
            logits = model(src[i : i + 1], torch.tensor([written]))[0, -1]
            logits[PAD] = -math.inf
            written.append(int(logits.argmax()))
        found.append(written[1:])
    longest = max(map(len, found))
    return torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in found])


SEEDS = range(8)


def test_the_random_models_write_varied_texts():
    """Otherwise the comparisons below would compare little."""
    texts = [
        greedy_search(translator(s), sources(), bos_id=1, eos_id=2, max_len=9)
        for s in SEEDS
    ]
    assert len({tuple(row) for text in texts for row in text.tolist()}) > 12
    lengths = [int((row != PAD).sum()) for text in texts for row in text]
    assert min(lengths) < 4
    assert max(lengths) == 9
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_search_equals_the_plain_loop(seed, use_cache):
    model, src = translator(seed), sources()
    found = greedy_search(
        model, src, bos_id=BOS, eos_id=EOS, max_len=9, use_cache=use_cache
    )
    assert torch.equal(found, greedy_by_hand(model, src, 9))


@pytest.mark.parametrize("search", [greedy_search, sample, beam_search])
def test_each_sequence_ends_with_padding_after_the_end_token(search):
    model = by_script([3, EOS], [4, 3, 5, EOS], [EOS])
    found = search(model, rows(3), bos_id=BOS, eos_id=EOS, max_len=20)
    assert found.tolist() == [[3, EOS, 0, 0], [4, 3, 5, EOS], [EOS, 0, 0, 0]]
    assert found.dtype == torch.long


@pytest.mark.parametrize("search", [greedy_search, sample])
def test_writing_stops_when_all_have_ended(search):
    model = by_script([3, EOS], [4, 3, 5, EOS])
    search(model, rows(2), bos_id=BOS, eos_id=EOS, max_len=20)
    assert model.calls == 4


def test_beam_search_stops_when_all_beams_have_ended():
    model = Script(
        lambda row, ids: [0.0, 0.0, 1.0, 0.0] if ids else [0, 0, 0.5, 0.5], 4
    )
    beam_search(model, rows(2), bos_id=BOS, eos_id=EOS, max_len=20, beam_size=2)
    assert model.calls == 2


@pytest.mark.parametrize("search", [greedy_search, sample, beam_search])
@pytest.mark.parametrize("seed", range(3))
def test_asking_a_gpu_now_and_then_changes_nothing(search, seed, monkeypatch):
    """Whether all have ended costs a wait there; what is too much is cut off."""
    model, src = translator(seed), sources()
    options = {"bos_id": BOS, "eos_id": EOS, "max_len": 12}

    def text():
        torch.manual_seed(0)
        return search(model, src, **options)

    expected, asked = text(), []

    def seldom(ended, tgt):
        if tgt.size(1) % 5:
            return False
        asked.append(tgt.size(1))
        return bool(ended.all())

    monkeypatch.setattr(generation, "_all", seldom)
    assert torch.equal(text(), expected)
    assert set(asked) <= {5, 10}


@pytest.mark.parametrize("search", [greedy_search, sample, beam_search])
@pytest.mark.parametrize("max_len", [1, 4])
def test_nothing_is_longer_than_asked(search, max_len):
    model = Script(lambda row, written: one_hot(3), 6)
    found = search(model, rows(2), bos_id=BOS, eos_id=EOS, max_len=max_len)
    assert found.tolist() == [[3] * max_len] * 2
    if search is not beam_search:
        assert model.calls == max_len


@pytest.mark.parametrize("search", [greedy_search, sample, beam_search])
def test_padding_is_never_written_by_choice(search):
    model = Script(lambda row, written: [0.9, 0.02, 0.02, 0.06], 4)
    found = search(model, rows(50), bos_id=BOS, eos_id=EOS, max_len=6)
    for ids in found.tolist():
        text = ids[: ids.index(EOS) + 1] if EOS in ids else ids
        assert PAD not in text
        assert all(token == PAD for token in ids[len(text) :])


@pytest.mark.parametrize("search", [greedy_search, sample, beam_search])
def test_the_model_is_left_as_it_was(search):
    model, src = translator(), sources()
    settings = {"bos_id": BOS, "eos_id": EOS, "max_len": 9}
    if search is sample:
        settings["generator"] = torch.Generator().manual_seed(3)
    expected = search(model, src, **settings)
    model.train()
    model.encoder.eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    for _ in range(3):  # dropout would give other texts
        if search is sample:
            settings["generator"] = torch.Generator().manual_seed(3)
        assert torch.equal(search(model, src, **settings), expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError):
        search(model, src + 100, **settings)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


# --- sampling -----------------------------------------------------------------------

SHARES = [0.3, 0.02, 0.08, 0.4, 0.05, 0.15]  # of the tokens, padding first


def draw(number=20_000, **settings):
    model = Script(lambda row, written: SHARES, 6)
    settings = {"generator": torch.Generator().manual_seed(5), **settings}
    ids = sample(model, rows(number), bos_id=BOS, eos_id=EOS, max_len=1, **settings)
    return torch.bincount(ids.flatten(), minlength=6)


def check_distribution(counts, shares):
    """Pearson's chi-square against a limit that chance exceeds once in 10,000."""
    from scipy.stats import chi2

    shares = torch.tensor(shares, dtype=torch.float64)
    expected = counts.sum() * shares / shares.sum()
    assert (counts[shares == 0] == 0).all()
    possible = shares > 0
    distance = ((counts - expected) ** 2 / expected)[possible].sum()
    assert distance < chi2.isf(1e-4, int(possible.sum()) - 1)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [0, 0.02, 0.08, 0.4, 0.05, 0.15]),
        ({"temperature": 0.5}, [0, 0.02**2, 0.08**2, 0.4**2, 0.05**2, 0.15**2]),
        ({"temperature": 2.0}, [0, *(s**0.5 for s in SHARES[1:])]),
        ({"top_k": 2}, [0, 0, 0, 0.4, 0, 0.15]),
        ({"top_k": 99}, [0, 0.02, 0.08, 0.4, 0.05, 0.15]),
        ({"top_p": 1.0}, [0, 0.02, 0.08, 0.4, 0.05, 0.15]),
        # Without padding the shares are 4/7, 1.5/7, 0.8/7, 0.5/7 and 0.2/7.
        ({"top_p": 0.56}, [0, 0, 0, 1, 0, 0]),
        ({"top_p": 0.58}, [0, 0, 0, 0.4, 0, 0.15]),
        ({"top_p": 0.78}, [0, 0, 0, 0.4, 0, 0.15]),
        ({"top_p": 0.79}, [0, 0, 0.08, 0.4, 0, 0.15]),
        ({"top_p": 0.98}, [0, 0.02, 0.08, 0.4, 0.05, 0.15]),
        # First the two likeliest, 8/11 and 3/11, then the nucleus among them.
        ({"top_k": 2, "top_p": 0.7}, [0, 0, 0, 1, 0, 0]),
        ({"top_k": 2, "top_p": 0.75}, [0, 0, 0, 0.4, 0, 0.15]),
        ({"temperature": 4.0, "top_k": 2}, [0, 0, 0, 0.4**0.25, 0, 0.15**0.25]),
    ],
)
def test_tokens_are_drawn_by_their_share(settings, shares):
    if sum(s > 0 for s in shares) == 1:
        assert draw(500, **settings).tolist() == [0, 0, 0, 500, 0, 0]
    else:
        check_distribution(draw(**settings), shares)


def test_the_chi_square_test_can_fail():
    with pytest.raises(AssertionError):
        check_distribution(draw(), [0, 0.02, 0.08, 0.4, 0.07, 0.15])


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9, 0.99])
def test_top_p_takes_the_smallest_set_in_every_row(top_p):
    torch.manual_seed(0)
    table = torch.rand(30, 8).pow(3)
    table[:, PAD] = 0
    shares = (table / table.sum(1, keepdim=True)).tolist()
    model = Script(lambda row, written: shares[row], 8)
    found = sample(
        model,
        rows(30).repeat(300, 1),
        bos_id=BOS,
        eos_id=EOS,
        max_len=1,
        top_p=top_p,
        temperature=1.0,
    ).view(300, 30)
    for row, share in enumerate(shares):
        smallest, order = None, sorted(range(8), key=lambda i: -share[i])
        for size in range(1, 9):
            if sum(share[i] for i in order[:size]) >= top_p:
                smallest = set(order[:size])
                break
        seen = set(found[:, row].tolist())
        assert seen <= smallest
        inside = sum(share[i] for i in smallest)
        likely = {i for i in smallest if share[i] / inside > 0.06}
        assert likely <= seen, "missed once in 10^8"


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}]
)
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_the_boldest_sample_is_greedy(settings, seed):
    model, src = translator(seed), sources()
    found = sample(model, src, bos_id=BOS, eos_id=EOS, max_len=9, **settings)
    assert torch.equal(
        found, greedy_search(model, src, bos_id=BOS, eos_id=EOS, max_len=9)
    )


def test_a_generator_repeats_its_texts():
    model, src = translator(), sources(8)

    def text(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        before = torch.get_rng_state()
        ids = sample(
            model,
            src,
            bos_id=BOS,
            eos_id=EOS,
            max_len=9,
            temperature=2.0,
            generator=generator,
            **settings,
        )
        assert torch.equal(torch.get_rng_state(), before)
        return ids.tolist()

    assert text(1) == text(1)
    assert text(1) == text(1, use_cache=False)
    assert text(1) != text(2)


# --- beams --------------------------------------------------------------------------


def penalised(log_prob, length, penalty):
    return log_prob / ((5 + length) / 6) ** penalty


def brute_force(model, src, max_len, penalty):
    """Score every sequence there is; return the best of each source."""
    words = [i for i in range(model.tgt_vocab_size) if i != PAD]
    inner = [i for i in words if i != EOS]
    texts = []
    for length in range(1, max_len + 1):
        last = words if length == max_len else [EOS]
        starts = itertools.product(inner, repeat=length - 1)
        texts += [(*start, end) for start in starts for end in last]
    written = torch.tensor([t + (PAD,) * (max_len - len(t)) for t in texts])
    read = torch.cat([torch.full((len(texts), 1), BOS), written[:, :-1]], dim=1)
    lengths = (written != PAD).sum(1)
    best = []
    for row in src:
        logits = model(row.expand(len(texts), -1), read)
        logits[..., PAD] = -math.inf
        steps = logits.log_softmax(-1).gather(2, written[..., None]).squeeze(2)
        total = steps.masked_fill(written == PAD, 0).sum(1)
        best.append(texts[int(penalised(total, lengths, penalty).argmax())])
    longest = max(map(len, best))
    return [list(text) + [PAD] * (longest - len(text)) for text in best]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_beams_enough_for_everything_find_the_best(penalty, seed):
    model, src = translator(seed, vocab=5), sources(3)
    with torch.no_grad():
        expected = brute_force(model, src, 4, penalty)
    found = beam_search(
        model,
        src,
        bos_id=BOS,
        eos_id=EOS,
        max_len=4,
        beam_size=128,
        length_penalty=penalty,
    )
    assert found.tolist() == expected


def beam_by_hand(model, src, max_len, size, penalty):
    """Keep the `size` best beginnings in a list; ended ones stay and compete."""
    best = []
    for row in src[:, None]:
        beams = [((), 0.0)]
        for _ in range(max_len):
            grown = []
            for text, total in beams:
                if EOS in text:
                    grown.append((text, total))
                    continue
                logits = model(row, torch.tensor([[BOS, *text]]))[0, -1]
                logits[PAD] = -math.inf
                steps = logits.log_softmax(-1).tolist()
                grown += [
                    ((*text, token), total + steps[token])
                    for token in range(1, model.tgt_vocab_size)
                ]
            grown.sort(key=lambda beam: -penalised(beam[1], len(beam[0]), penalty))
            beams = grown[:size]
        best.append(
            max(beams, key=lambda beam: penalised(beam[1], len(beam[0]), penalty))[0]
        )
    longest = max(map(len, best))
    return [list(text) + [PAD] * (longest - len(text)) for text in best]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_narrow_beams_equal_the_plain_program(penalty, size, seed):
    model, src = translator(seed), sources(3)
    with torch.no_grad():
        expected = beam_by_hand(model, src, 6, size, penalty)
    found = beam_search(
        model,
        src,
        bos_id=BOS,
        eos_id=EOS,
        max_len=6,
        beam_size=size,
        length_penalty=penalty,
    )
    assert found.tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_one_beam_is_greedy(seed, penalty):
    model, src = translator(seed), sources()
    settings = {"bos_id": BOS, "eos_id": EOS, "max_len": 9}
    found = beam_search(model, src, beam_size=1, length_penalty=penalty, **settings)
    assert torch.equal(found, greedy_search(model, src, **settings))


def test_two_beams_leave_the_garden_path():
    """The likelier first word (0.6) leads to two poor endings, the other does not."""

    def rule(row, written):
        if not written:
            return [0, 0, 0, 0.6, 0.4, 0]
        if written == (3,):
            return [0, 0, 0.5, 0, 0, 0.5]
        return [0, 0, 1.0, 0, 0, 0]

    settings = {"bos_id": BOS, "eos_id": EOS, "max_len": 5}
    assert greedy_search(Script(rule, 6), rows(1), **settings)[0, 0] == 3
    found = beam_search(
        Script(rule, 6), rows(2), beam_size=2, length_penalty=0.0, **settings
    )
    assert found.tolist() == [[4, EOS]] * 2


def test_the_length_penalty_favours_length():
    model = Script(lambda row, written: [0, 0, 0.4, 0.6], 4)
    settings = {"bos_id": BOS, "eos_id": EOS, "max_len": 6, "beam_size": 20}
    short = beam_search(model, rows(1), length_penalty=0.0, **settings)
    long = beam_search(model, rows(1), length_penalty=3.0, **settings)
    assert short.tolist() == [[EOS]]  # log 0.4 beats 6 log 0.6
    assert long.tolist() == [[3] * 6]  # 6 log 0.6 / (11/6)³ beats log 0.4


# --- the cache ----------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("steps", [[1] * 6, [2, 1, 3], [5, 1], [6]])
@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
def test_cached_logits_equal_uncached(norm_first, steps, side):
    model = translator(norm_first=norm_first, scale=0.2)
    src, tgt = sources(3), torch.randint(3, 7, (3, 6))
    tgt[:, 0] = BOS
    if side in ("left", "both"):
        tgt[1, :2] = PAD
    if side in ("right", "both"):
        tgt[2, 4:] = PAD
    with torch.no_grad():
        expected = model(src, tgt)
        memory, cache, found = model.encode(src), model.new_cache(), []
        for end in itertools.accumulate(steps):
            found.append(model.decode(tgt[:, :end], memory, src, cache=cache))
    assert [x.size(1) for x in found] == steps
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-5)


def test_the_cache_spares_the_work():
    """A step projects one new token, however long the text already is."""
    model, seen = translator(), []
    attention = model.decoder.layers[0].self_attention
    handle = attention.in_proj.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].size(1))
    )
    model.head.weight.data[EOS] = 0  # so that the text goes on for some steps
    text = greedy_search(model, sources(1), bos_id=BOS, eos_id=EOS, max_len=6)
    handle.remove()
    assert seen == [1] * text.size(1)
    assert text.size(1) > 1


def test_left_padding_is_not_seen():
    """What stands before the start token of a shorter target does not matter."""
    model, src = translator(), sources(1)
    tgt = torch.tensor([[PAD, PAD, BOS, 4, 5]])
    look = causal_mask(5) & (tgt != PAD)
    assert look[4].tolist() == [False, False, True, True, True]
    before = model(src, tgt)[:, 2:]
    with torch.no_grad():
        model.tgt_embed.weight[PAD] += 10.0  # its own logit changes, no other
    after = model(src, tgt)[:, 2:]
    torch.testing.assert_close(before[..., 1:], after[..., 1:])
