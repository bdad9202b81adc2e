"""The recurrences of samplers, as in their papers: functions of a state and of noise levels, from the noisiest to the cleanest.

`run` is a `Trace`, which makes a program of them, or a `Reference`, which computes them on tensors. States are x = alpha x0 +
sigma eps; lam = ln(alpha / sigma).
"""

from .accelerated import accelerated_ddim as accelerated_ddim
from .accelerated import accelerated_ddpm as accelerated_ddpm
from .adams import deis as deis
from .adams import ghvb as ghvb
from .adams import heavy_ball as heavy_ball
from .adams import ipndm as ipndm
from .adams import pndm as pndm
from .consistency import lcm as lcm
from .consistency import tcd as tcd
from .ddim import ddim as ddim
from .ddim import ddpm as ddpm
from .ddim import repaint as repaint
from .dpm import dpm_solver as dpm_solver
from .dpm import dpmpp_2s_ancestral as dpmpp_2s_ancestral
from .dpm import dpmpp_sde as dpmpp_sde
from .dpm import er_sde as er_sde
from .dpm import res_multistep as res_multistep
from .dpm_multistep import dpm_multistep as dpm_multistep
from .dpm_multistep import dpm_singlestep as dpm_singlestep
from .dpm_multistep import dpmpp_2m as dpmpp_2m
from .dpm_multistep import dpmpp_2m_sde as dpmpp_2m_sde
from .dpm_multistep import dpmpp_3m_sde as dpmpp_3m_sde
from .dpm_v3 import Statistics as Statistics
from .dpm_v3 import dpm_solver_v3 as dpm_solver_v3
from .dpm_v3 import fit_statistics as fit_statistics
from .euler import dpm_2 as dpm_2
from .euler import dpm_2_ancestral as dpm_2_ancestral
from .euler import euler as euler
from .euler import euler_ancestral as euler_ancestral
from .euler import euler_ancestral_rf as euler_ancestral_rf
from .euler import heun as heun
from .euler import heunpp2 as heunpp2
from .euler import restart as restart
from .flow import heun_flow as heun_flow
from .inversion import bdia as bdia
from .langevin_correctors import annealed_langevin as annealed_langevin
from .langevin_correctors import reverse_diffusion as reverse_diffusion
from .multistep import gradient_estimation as gradient_estimation
from .multistep import lms as lms
from .residual import mean_reverting as mean_reverting
from .residual import rddm as rddm
from .residual import sgmse as sgmse
from .unipc import unipc as unipc
