"""The recurrences of samplers, as in their papers: functions of a state and of noise levels, from the noisiest to the cleanest.

`run` is a `Trace`, which makes a program of them, or a `Reference`, which computes them on tensors. States are x = alpha x0 +
sigma eps; lam = ln(alpha / sigma).
"""

from .adams import deis as deis
from .adams import ghvb as ghvb
from .adams import heavy_ball as heavy_ball
from .adams import ipndm as ipndm
from .adams import pndm as pndm
from .consistency import lcm as lcm
from .consistency import tcd as tcd
from .ddim import ddim as ddim
from .ddim import ddpm as ddpm
from .dpm import dpmpp_2m as dpmpp_2m
from .dpm_multistep import dpm_multistep as dpm_multistep
from .dpm_multistep import dpm_singlestep as dpm_singlestep
from .euler import euler as euler
from .flow import heun_flow as heun_flow
from .unipc import unipc as unipc
