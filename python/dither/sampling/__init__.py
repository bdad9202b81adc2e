"""Sampling from diffusion models and flows: solvers as programs, run by one kernel call a step."""

from . import grids as grids
from . import guidance as guidance
from . import kdiffusion as kdiffusion
from . import solvers as solvers
from .brownian import BrownianNoise as BrownianNoise
from .interop import DiffusersScheduler as DiffusersScheduler
from .interop import denoiser as denoiser
from .interop import edm_denoiser as edm_denoiser
from .interop import from_scheduler_config as from_scheduler_config
from .points import Flow as Flow
from .points import Point as Point
from .points import Process as Process
from .points import VarianceExploding as VarianceExploding
from .points import VariancePreserving as VariancePreserving
from .program import Program as Program
from .sample import SAMPLERS as SAMPLERS
from .sample import Sampler as Sampler
from .sample import noise as noise
from .sample import program as program
from .sample import sample as sample
from .sample import samplers_table as samplers_table
