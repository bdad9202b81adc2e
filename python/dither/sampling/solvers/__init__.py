"""The recurrences of samplers, as in their papers: functions of a state and of noise levels, from the noisiest to the cleanest.

`run` is a `Trace`, which makes a program of them, or a `Reference`, which computes them on tensors. States are x = alpha x0 +
sigma eps; lam = ln(alpha / sigma).
"""

from .ddim import ddim as ddim
from .dpm import dpmpp_2m as dpmpp_2m
from .euler import euler as euler
