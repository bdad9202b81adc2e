"""Numbers that the papers' own code gave of small models, as constants: oracles that share nothing with this library.

Each was computed in float64 by the functions named beside it, whose noise was replaced by the noise of the same seeds here.
Models are `eps_of`; levels are Stable Diffusion's, of the times given. Tolerances are rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dither import sampling
from dither.sampling import grids, solvers
from dither.sampling.inversion import NoiseMaps, Pair
from dither.sampling.points import Flow, Point, VariancePreserving
from dither.sampling.run import compiled, run_program

SD = VariancePreserving.scaled_linear()
CLEAN = Point(1.0, 0.0, -1.0)


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def eps_of(bend: float = 0.1) -> Callable[..., Tensor]:
    def model(x: Tensor, time: Tensor, shift: float = 0.0) -> Tensor:
        t = time.view(-1, *[1] * (x.ndim - 1))
        return torch.tanh(x * (1 + t / 1000)) + bend * x**2 - shift * torch.cos(x)

    return model


ROWS = tensor(
    [0.4, -0.7, 1.1, 0.2], [-0.5, 0.9, 0.3, -1.3], [1.2, 0.1, -0.6, 0.8], [0.3, -0.2, 0.7, -0.9], [0.6, 0.5, -0.4, -0.1]
)


def near(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-12, atol=1e-13)


BDIA = {
    # gamma: of the start below, the sample and the state before it; the pair that data are inverted to
    1.0: (
        [0.20448134072971408, -0.6740112988660997, 0.5570319968495498, -0.38553491866375117],
        [-0.04010837415167473, -0.6911499224814829, 0.21160568325711443, 0.2086828100942564],
        [-1.0538097539779259, 0.8766884065252024, 0.21690433330739095, 1.9073377128161713],
        [-1.1640654931492627, 0.6764648464897137, 0.1326257148758268, 2.1862834586607143],
    ),
    0.7: (
        [0.10432789108751099, -0.655640704802809, 0.41620135911646644, -0.13849631389662945],
        [0.020708385954219657, -0.6355379557091744, 0.29396615541334736, 0.03359003710433937],
        [-1.1215025855168295, 0.9796793528766862, 0.2477117821719088, 2.0856102459786108],
        [-1.1474844955874977, 0.6671004949427392, 0.1386183465946624, 2.1094882642609587],
    ),
}


@pytest.mark.parametrize("gamma", BDIA)
def test_bdia(gamma: float) -> None:
    """BDIA_stablediffusion of guoqiang-zhang-x/BDIA, image-editing/bdia_edict_functions.py: 5 steps, set_alpha_to_one."""
    points, model = [*(SD.at_time(t) for t in (800, 600, 400, 200, 0)), CLEAN], eps_of()
    x, before, noisiest, next_ = (tensor(row) for row in BDIA[gamma])
    start = Pair(tensor([0.3, -1.0, 0.8, -0.2]), tensor([0.25, -0.9, 0.9, -0.3]))
    found = sampling.bdia_sample(model, start, points, gamma=gamma)
    assert near(found.x, x) and near(found.before, before)
    assert not near(sampling.bdia_sample(model, start, points, gamma=gamma - 1e-6).x, x)

    data = tensor([-1.2, 0.3, 0.05, 2.0])
    first = points[-2].alpha * data + points[-2].sigma * model(data, tensor([-200.0]))  # asked at the clean level
    found = sampling.bdia_invert(model, Pair(data, first), points, gamma=gamma)
    assert near(found.x, noisiest) and near(found.before, next_)


EDICT = {
    # times: of the start below, the two samples; the two states that data are inverted to
    (801, 601, 401, 201, 1): (
        [-1.1139774941131517, -1.0480902323800583, -0.04551826832779964, 0.744539798227179],
        [1.2127817744876956, -1.0490082835138912, 0.5473852307651682, -1.0519640522153184],
        [-1.0262102893999636, 0.8713755936621773, 0.26679279618321616, 1.781240400338869],
        [-1.0204321753845074, 0.8496571172221029, 0.21232418595658664, 1.8503119298256372],
    ),
    (751, 501, 251, 1): (
        [-0.7894821754799923, -0.8903054218767038, 0.010599309040918797, 0.5563685677196167],
        [1.0893860402312199, -0.9146612610172412, 0.7362579179928422, -0.9324846235652556],
        [-1.0635737153711942, 0.8441105433627822, 0.22777466895798804, 1.879551154507264],
        [-1.058524118279147, 0.7972574215212143, 0.17519322561950013, 1.9482752474874339],
    ),
}


@pytest.mark.parametrize("times", EDICT)
def test_edict(times: tuple[int, ...]) -> None:
    """coupled_stablediffusion of salesforce/EDICT, edict_functions.py: leapfrog_steps, mix_weight 0.93, without guidance."""
    points, model = [SD.at_time(t) for t in (*times, 0)], eps_of()
    x, y, x_noise, y_noise = (tensor(row) for row in EDICT[times])
    start = tensor([0.3, -1.0, 0.8, -0.2])
    found = sampling.edict_sample(model, start, points)
    assert near(found.x, x) and near(found.y, y)
    assert not near(sampling.edict_sample(model, start, points, mix=0.93 + 1e-6).x, x)
    back = sampling.edict_invert(model, found, points)
    assert near(back.x, start) and near(back.y, start)
    found = sampling.edict_invert(model, tensor([-1.2, 0.3, 0.05, 2.0]), points)
    assert near(found.x, x_noise) and near(found.y, y_noise)


def test_edit_friendly_ddpm() -> None:
    """inversion_forward_process and reverse_step of inbarhub/DDPM_inversion, ddm_inversion/inversion_utils.py: eta 1."""
    points, x = [*(SD.at_time(t) for t in (801, 601, 401, 201, 1)), CLEAN], tensor([-1.2, 0.3, 0.05, 2.0])
    maps = sampling.ddpm_invert(eps_of(), x, points, seed=3)
    noises = tensor(
        [1.6261203508902384, -0.8281518101686779, 1.6529816731269147, 1.0725322377062094],
        [-1.4948381747023538, -2.1652763980729723, -0.33327815441736214, 2.099238954826809],
        [-0.9728400554981519, 0.9925030661271461, -0.7637072614989877, 0.8240867926028279],
        [-5.970137267618937, 7.241808390138637, 4.4159051689605695, 16.25513009307928],
    )
    assert near(torch.cat(maps.noises), noises)
    assert isinstance(maps, NoiseMaps)
    # replayed with another condition, from the second step on; there is no residual in theirs
    edit = sampling.ddpm_replay(eps_of(), maps, points, skip=1, residual=False, arguments={"shift": 0.3})
    assert near(edit, tensor([-0.4673384574475369, 0.5796334327842952, 0.3533998026120293, 1.976264935209894]))


@pytest.mark.parametrize(
    ("eta", "expected"),
    [
        (1.0, [-0.6077704725048977, 0.6768649249454175, 0.39884751918872485, 2.051993232432043]),
        (0.3, [-0.8580663979867393, 0.6089803237622544, 0.4465028120077987, 2.1514043091690915]),
    ],
)
def test_ddcm(eta: float, expected: list[float]) -> None:
    """ddcm_sampler of sled-group/InfEdit, pipeline_ead.py: the last pred_x0."""
    points, x = [*(SD.at_time(t) for t in (801, 601, 401, 201, 1)), CLEAN], tensor([-1.2, 0.3, 0.05, 2.0])
    noises = iter(ROWS.split(1))
    found = sampling.ddcm_edit(
        eps_of(), x, points, source={"shift": 0.0}, target={"shift": 0.3}, eta=eta, noise_sampler=lambda *_: next(noises)
    )
    assert near(found, tensor(expected))


def test_noise_diffusion() -> None:
    """interpolate_new of Tranquil1ty/NoiseDiffusion, controlnet/cm.py: t = 401, frac 0.3, gamma 0.4."""
    _, _, x_a, x_b, z = ROWS.split(1)
    a, b = tensor([0.4, -2.7, 1.1, 0.2], [-0.5, 0.9, 3.3, -1.3]).split(1)
    found = sampling.noise_diffusion(a, b, 0.3, x_a, x_b, SD.at_time(401), gamma=0.4, noise=z)
    assert near(found, tensor([0.2818642275419623, -1.1067982138058805, 1.612340962733425, -0.4127902014115796]))


def test_gotta_go_fast() -> None:
    """AdaptivePredictor of AlexiaJM/score_sde_fast_sampling, sde_sampling_torch.py, to eps = 0: 107 steps for both samples."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1)
        return torch.tanh(x / (0.1 + s**2)) * 0.9 + 0.05 * x / (1 + s**2)

    x = 20 * tensor([0.5, -1.0, 0.25, 1.5], [-0.3, 0.8, -1.2, 0.1])
    found = sampling.gotta_go_fast(denoiser, x, 20.0, 0.05, rtol=0.05, atol=0.05, seed=5)
    expected = tensor(
        [-0.9451420944435138, 0.9416793935816477, 0.9492700393650383, 0.9521273055479433],
        [0.9491897005352211, -0.9448731344267318, 0.9491174881536053, -0.9441618089357577],
    )
    assert near(found.x, expected) and int(found.evaluations.max()) == 2 * 108 + 1


PARADIGMS = {
    # eta, window, tolerance: sweeps, evaluations, sample
    (0.0, 6, 0.1): (8, 43, [0.0462153790970089, -0.7264581450695339, 0.015924594953999185, 5.4804151380038615]),
    (0.0, 20, 0.5): (5, 57, [0.04747852755594522, -0.6868328414645445, 0.013420933379158688, 4.162903147674693]),
    (1.0, 6, 0.5): (9, 45, [-0.3273582056775898, 0.5577110058744036, -0.21008904146497628, -0.3197317699400349]),
    (1.0, 20, 0.1): (10, 115, [-0.3101563736765367, 0.5929414263695557, -0.18861716820100496, -0.2945257191234306]),
}


@pytest.mark.parametrize("case", PARADIGMS)
def test_paradigms(case: tuple[float, int, float]) -> None:
    """paradigms_forward of AndyShih12/paradigms with batch_step_no_noise of its DDIM: 20 times, 951 .. 1, the end at time 0."""
    points = [SD.at_time(t) for t in (*range(951, 0, -50), 0)]
    x = tensor([0.5, -1.0, 0.25, 1.5], [-0.3, 0.8, -1.2, 0.1])
    (eta, window, tolerance), (sweeps, evaluations, first) = case, PARADIGMS[case]
    run = {"prediction": "eps", "window": window, "tolerance": tolerance, "eta": eta, "seed": 7}
    found = sampling.paradigms(eps_of(0.0), x, points, **run)
    assert near(found.x[:1], tensor(first)) and found[1:] == (sweeps, evaluations)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.01, "111101110111000011100001111111"), (0.03, "111101110000111000011100001011")],
)
def test_adaptive_skip(threshold: float, expected: str) -> None:
    """estimate_skipping and its loop of UniModal4Reasoning/AdaptiveDiffusion with DDIM: 1 where the network is called."""
    points = [*(SD.at_time(t) for t in range(958, 0, -33)), CLEAN]
    model = sampling.AdaptiveSkip(eps_of(0.0), threshold)
    called = []

    def counted(x: Tensor, time: Tensor) -> Tensor:
        before = model.calls
        found = model(x, time)
        called.append(model.calls - before)
        return found

    run_program("t", compiled(solvers.ddim, points, SD, "eps"), counted, tensor([0.5, -1.0, 0.25, 1.5], [-0.3, 0.8, -1.2, 0.1]))
    assert "".join(map(str, called)) == expected


def test_optimal_denoiser_of_pfgmpp() -> None:
    """pfgmv2_target of Newbeeer/pfgmpp, training/loss.py: N = 3, D = 8, r = 0.7 sqrt(8), but for 1e-7 added there."""
    data = tensor([-1.0, 0.5, 0.2], [0.3, 0.8, -0.4], [1.2, -0.6, 0.1], [0.0, 0.0, 0.9])
    found = sampling.optimal_denoiser(tensor([0.2, 0.1, -0.3], [1.5, -1.0, 0.4]), data, sigma=0.7, dimensions=8.0)
    expected = tensor(
        [0.2198153920238254, 0.40341135356753965, -0.013528623826414482],
        [1.129092430823495, -0.5519197386416104, 0.1291434307592223],
    )
    assert (found - expected).abs().max() < 2e-7


def test_levels_of_a_rolling_window() -> None:
    """set_progressive_timesteps_stages of desaixie/pa_vdm, opensora/schedulers/rf: 3 frames, 6 steps, times 0 .. 1000."""
    seen = []

    def model(x: Tensor, time: Tensor) -> Tensor:
        seen.append(time[0].tolist())
        return x

    points = [Flow(1000).at(r) for r in grids.flow(6)]
    sampling.rolling(model, 4, (1, 2), points, window=3, process=Flow(1000), prediction="velocity", seed=0)
    stages = [[333.3333333333333, 666.6666666666666, 1000.0], [166.66666666666666, 500.0, 833.3333333333333]]
    for k, times in enumerate(seen[4:]):
        assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(times, stages[k % 2])), (k, times)
    assert len(seen) == 6 + 3 * 2


MOMENTUM = {
    # order, beta: of the start below
    "ghvb": {
        (1, 0.2): [-0.5501925381014323, -1.2227370007016147],
        (1, 0.5): [-0.07946153401050472, -1.3041223690003432],
        (1, 0.8): [-0.003547521338379988, -1.3553905609715096],
        (1, 1.0): [0.013225886873363908, -1.3801742012190394],
        (2, 0.2): [0.03995817818511632, -1.4019730062005504],
        (2, 0.5): [0.04520381742535591, -1.4212897131743372],
        (2, 0.8): [0.04514487447791592, -1.4325672769840065],
        (2, 1.0): [0.04491950953035136, -1.4378495212126943],
        (3, 0.2): [0.02947093034264523, -1.4278371912684031],
        (3, 0.5): [0.028240392513159306, -1.4350480399363528],
        (3, 0.8): [0.024817719158733594, -1.439691894348346],
        (3, 1.0): [0.013144499902939892, -1.4421645828367304],
        (4, 0.2): [0.029720487314604787, -1.4252472193555132],
        (4, 0.5): [0.025974022401046577, -1.4312234702669566],
        (4, 0.8): [-0.016110763624419173, -1.4363960624267007],
        (4, 1.0): [-0.10052385750707962, -1.4395987445812701],
    },
    "heavy_ball": {
        (1, 0.2): [-0.5501925381014323, -1.2227370007016147],
        (1, 0.5): [-0.07946153401050472, -1.3041223690003432],
        (1, 0.8): [-0.003547521338379988, -1.3553905609715096],
        (1, 1.0): [0.013225886873363908, -1.3801742012190394],
        (2, 0.2): [-0.41968281157635073, -1.2410362771480319],
        (2, 0.5): [-0.02570443528610873, -1.3412138576214687],
        (2, 0.8): [0.029482325186600315, -1.4058675892677555],
        (2, 1.0): [0.04491950953035136, -1.4378495212126943],
        (3, 0.2): [-0.43779852570773736, -1.2422298613516165],
        (3, 0.5): [-0.04891539193834188, -1.3437720483621163],
        (3, 0.8): [0.011839872535379395, -1.409517969551035],
        (3, 1.0): [0.013144499902939892, -1.4421645828367304],
        (4, 0.2): [-0.44426481591588546, -1.241539609453175],
        (4, 0.5): [-0.041801816507941264, -1.3422565498571637],
        (4, 0.8): [0.009825515956988927, -1.4073311913987498],
        (4, 1.0): [-0.10052385750707962, -1.4395987445812701],
    },
}


@pytest.mark.parametrize(("order", "beta"), MOMENTUM["ghvb"])
@pytest.mark.parametrize("solver", MOMENTUM)
def test_momentum(solver: str, order: int, beta: float) -> None:
    """GHVBScheduler and PLMSWithHBScheduler of sWizad/momentum-diffusion, momentum_scheduler.py: 8 steps, set_alpha_to_one."""
    points = [*(SD.at_time(t) for t in range(875, -1, -125)), CLEAN]
    program = compiled(getattr(solvers, solver), points, SD, "eps", options={"order": order, "beta": beta})
    assert near(run_program("test", program, eps_of(), tensor([0.3, -1.0])), tensor(MOMENTUM[solver][order, beta]))
