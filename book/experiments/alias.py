"""Do rotary positions err where a key stands that looks like the right one?"""

import torch

from minivit.experiments.reach import (
    BACK,
    LONGEST,
    Recall,
    right_by_place,
    three_back,
    train,
    within,
)

ZONES = {
    "ends": [*range(3, 11), *range(91, 96)],
    "outer": [*range(11, 36), *range(66, 91)],
    "inner": [*range(36, 49), *range(53, 66)],
    "middle": [*range(49, 53)],
}


def with_hand(slowness, seed):
    torch.manual_seed(seed)
    model = Recall("rotary")
    model.encoder.layers[0].self_attention.speed[1] = 1 / slowness
    return train(model, three_back, seed)


def far_from_target(distances):
    places = torch.arange(LONGEST)
    off = (places[:, None] - BACK - places).abs()  # (L, S)
    return torch.isin(off, torch.tensor(distances))


def errors(model, seed, mask=None):
    right = right_by_place(model, three_back, seed, mask=mask)
    wrong = dict(zip(range(BACK, LONGEST), (100 - right).tolist()))
    return {
        zone: sum(wrong[place] for place in places) / len(places)
        for zone, places in ZONES.items()
    }


@torch.no_grad()
def names_the_double(model, seed):
    generator = torch.Generator().manual_seed(10**6 + seed)
    ids, _ = three_back(200, LONGEST, generator)
    said = model(ids).argmax(dim=-1)[:, 66:]  # (B, 30)
    wrong = said != ids[:, 63:-BACK]
    double = said == ids[:, : LONGEST - 66]
    return 100 * double[wrong].float().mean().item()


def run(seed):
    """Wrong answers in percent, with other hands and with keys hidden."""
    figures = {}
    for slowness in (8, 10, 14, 16):
        model = with_hand(slowness, seed)
        for zone, share in errors(model, seed).items():
            figures[f"1/{slowness}, {zone}"] = share
        if slowness == 10:
            published = model
    figures["names the double"] = names_the_double(published, seed)
    double, other = (
        far_from_target([62, 63, 64]),
        far_from_target([55, 56, 57]),
    )
    scenes = {
        "double hidden": ~double,
        "others hidden": ~other,
        "near keys": within(31),
        "near keys and double": within(31) | double,
    }
    for scene, mask in scenes.items():
        wrong = errors(published, seed, mask)
        figures[f"{scene}, ends"] = wrong["ends"]
        figures[f"{scene}, outer"] = wrong["outer"]
    return figures
