"""Which weights recipes find, under which names, and how a recipe ends: for its model and for copies of it."""

import copy

import numpy
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dither import optim, sparsity
from dither.sparsity import SRSTE, STEP, GradualPruning, LotteryTicket, MaskDecay, RigL, StructureDecay


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def advance(model, optimizer, recipe, steps, averages=()):
    for t in steps:
        g = torch.Generator().manual_seed(t)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 16, generator=g)), torch.randint(8, (8,), generator=g)).backward()
        optimizer.step()
        recipe.step()
        for average in averages:
            average.update_parameters(model)


def kept(w, m=4):
    return set(w.unflatten(1, (-1, m)).count_nonzero(-1).flatten().tolist())


class Language(nn.Module):
    """A head that is tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


@pytest.mark.parametrize("masks", [False, True], ids=["decay", "masks"])
def test_a_weight_tied_to_an_embedding_is_sparse_in_both(masks):
    torch.manual_seed(0)
    model, tokens = Language(), torch.arange(12)
    (layer,) = sparsity.sparsifiable(model)
    assert layer.name == "head.weight" and layer.tied == ((model.embed, "weight"),)
    if masks:
        sparsity.apply_masks(model, {"head.weight": sparsity.nm_mask(layer.weight, 2, 4)})
    else:
        recipe = SRSTE(model, (2, 4))
    trained = model(tokens)
    assert kept(model.embed.weight) == kept(model.head.weight) == {2} and kept(layer.weight) == {4}
    plain = sparsity.bake(model) if masks else recipe.finish()
    assert plain.embed.weight is plain.head.weight and kept(plain.head.weight) == {2}
    assert torch.equal(plain(tokens), trained), "what was trained is what remains"
    assert not list(sparsity.sparsifiable(Language(), skip="head.*"))


def test_names_are_those_of_the_model_inside():
    names = ["0.weight", "2.weight"]
    compiled = torch.compile(network(), backend="eager")
    parts = network()
    parts[2] = torch.compile(parts[2], backend="eager")
    for model in (compiled, parts, AveragedModel(network()), nn.DataParallel(network())):
        assert [layer.name for layer in sparsity.sparsifiable(model)] == names
    recipe = MaskDecay(compiled, {"2.*": (2, 4)}, end=2)
    recipe.step()
    recipe.step()
    inside = compiled._orig_mod
    assert kept(inside[2].weight) == {2} and kept(inside[0].weight) == {4}
    plain = MaskDecay(network(), {"2.*": (2, 4)}, end=2)
    plain.load_state_dict(recipe.state_dict())
    assert plain.steps == 2


def test_patterns_must_match():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.utils.weight_norm(nn.Linear(4, 4)))
    for found in ("1.*", "*.bias", "2.weight", "2.weight_g", "?.weight"):
        assert list(sparsity.sparsifiable(model, skip=found)) is not None
    for argument in ("only", "skip"):
        with pytest.raises(
            ValueError, match=f"sparsifiable: {argument} has 'head', expected a pattern of .* 0.weight, 0.bias, 1.w"
        ):
            list(sparsity.sparsifiable(model, **{argument: ["0.*", "head"]}))


def test_groups_stay_inside_the_groups_of_a_transposed_convolution():
    def layer(groups):
        return nn.ConvTranspose2d(24, 12, 3, groups=groups)

    assert next(sparsity.sparsifiable(layer(4))).features == 6
    assert next(sparsity.sparsifiable(nn.Conv2d(24, 12, 3, groups=4))).features == 6
    assert not list(sparsity.sparsifiable(layer(4), m=4)) and list(sparsity.sparsifiable(layer(3), m=4))
    with pytest.raises(ValueError, match="no weight fits 2:4"):
        SRSTE(layer(4), (2, 4))


def test_integers_of_numpy():
    w, two, four = torch.randn(8, 8), numpy.int64(2), numpy.int32(4)
    assert torch.equal(sparsity.nm_mask(w, two, four, numpy.int64(1)), sparsity.nm_mask(w, 2, 4))
    recipe = MaskDecay(network(), (two, four), begin=numpy.int64(0), end=four)
    assert recipe.state_dict()["config"]["structure"]["0.weight"] == [2, 4] and type(recipe.end) is int
    with pytest.raises(ValueError, match="n:m is True:4"):
        sparsity.nm_mask(w, True, 4)


# The end of a recipe

MAKE = {
    "decay": lambda model, optimizer: MaskDecay(model, (2, 4), end=9),
    "structure": lambda model, optimizer: StructureDecay(model, (1, 4), end=9),
    "sr-ste": lambda model, optimizer: SRSTE(model, (2, 4), optimizer),
    "step": lambda model, optimizer: STEP(model, (2, 4), optimizer, steps=9),
    "gradual": lambda model, optimizer: GradualPruning(model, optimizer, density=0.25, end=6, every=2),
    "gradual, wrapped": lambda model, optimizer: GradualPruning(model, density=0.25, end=6, every=2),
    "rigl": lambda model, optimizer: RigL(model, optimizer, density=0.25, end=9, every=2, seed=0),
    "lottery": lambda model, optimizer: LotteryTicket(model, fraction=0.5),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_of_the_weights_finish_too(name, use_buffers):
    """Whether the average was made before the recipe was at its end, and whether it averages buffers or copies them."""
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    recipe = MAKE[name](model, optimizer)
    if name == "lottery":
        recipe.step = recipe.prune
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)]
    advance(model, optimizer, recipe, range(3), averages)
    averages.append(AveragedModel(model, use_buffers=use_buffers))
    advance(model, optimizer, recipe, range(3, 6), averages)
    dense = [[layer.weight.clone() for layer in sparsity.sparsifiable(average)] for average in averages]
    masks = None if isinstance(recipe, sparsity.progressive._NMRecipe) else dict(recipe.masks)
    structure = (1 if name == "structure" else 2, 4)
    for average, weights in zip(averages, dense):
        parameters = set(average.parameters())
        assert recipe.finish(average) is average and not recipe.finished
        assert (
            set(average.parameters()) == parameters and not sparsity.masks_of(average) and len(average.module.state_dict()) == 4
        )
        for layer, w in zip(sparsity.sparsifiable(average), weights):
            keep = sparsity.nm_mask(w, *structure) if masks is None else masks[layer.name]
            assert torch.equal(layer.weight, torch.where(keep, w, 0))
    state = copy.deepcopy(model.state_dict())
    advance(model, optimizer, recipe, [6])
    assert any(not torch.equal(state[key], value) for key, value in model.state_dict().items() if "weight" in key)
    recipe.finish()
    assert recipe.finished and recipe.finish() is model
    if name in ("decay", "structure", "sr-ste", "step"):
        with pytest.raises(ValueError, match=r"finish: model is a Sequential without an NM parametrization of '0.weight'"):
            recipe.finish(network())


@pytest.mark.parametrize("name", ["gradual", "gradual, wrapped", "rigl"])
def test_recipes_of_masks_leave_a_plain_model(name):
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    recipe = MAKE[name](model, optimizer)
    advance(model, optimizer, recipe, range(8))
    masks, saved = recipe.masks, recipe.state_dict()
    assert recipe.finish() is model and list(model.state_dict()) == list(network().state_dict())
    for layer in sparsity.sparsifiable(model):
        assert torch.equal(layer.weight != 0, masks[layer.name])
    advance(model, optimizer, recipe, [8])
    assert recipe.masks is masks and all((layer.weight != 0).all() for layer in sparsity.sparsifiable(model)), "nothing freezes"
    for call in (lambda: recipe.load_state_dict(saved), lambda: recipe._apply(masks)):
        with pytest.raises(RuntimeError, match="has finished, expected one that trains; make a new one"):
            call()


def test_finished_tickets_do_not_prune():
    ticket = LotteryTicket(network())
    ticket.prune()
    ticket.finish()
    with pytest.raises(RuntimeError, match="this LotteryTicket has finished"):
        ticket.prune()
