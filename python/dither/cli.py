"""The command line: `python -m dither info | demo | bench | samplers`.

Exit status: 0; 1 where a package or a file is missing; 2 for arguments that are refused; 130 after Ctrl-C; 141 where nobody
reads what is printed any more.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ._extras import MissingExtra
from .ops import build_info


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, expected at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dither", description="Fused kernels for PyTorch: facts, demo, benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, instruction sets and devices")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="train on real digits, write a report and a figure")
    demo.add_argument("--out", type=Path, default=Path("dither-demo"), metavar="DIR", help="default: dither-demo")
    demo.add_argument("--quick", action="store_true", help="fewer steps and seeds: seconds instead of a minute")
    demo.add_argument("--seeds", type=_count, metavar="N", help="seeds per row; default 5, with --quick 2")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu, the networks are tiny")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="time the kernels, their peers and the memory roof")
    bench.add_argument("families", nargs="*", metavar="family", help="default: every family")
    bench.add_argument("--json", type=Path, metavar="F", help="write every number to this file")
    bench.add_argument("--markdown", type=Path, metavar="F", help="write the tables to this file")
    bench.add_argument("--quick", action="store_true", help="small sizes, few repetitions")
    bench.add_argument("--device", choices=("cpu", "cuda"))
    bench.add_argument("--threads", type=_count, metavar="N", help="of the CPU")
    bench.set_defaults(run=_bench)

    samplers = commands.add_parser("samplers", help="diffusion samplers by name")
    samplers.add_argument("--markdown", action="store_true", help="the table of the documentation")
    samplers.set_defaults(run=_samplers)
    return parser


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value) or "none"


def _info(args: argparse.Namespace) -> None:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    facts = {
        **build_info(),
        "torch_threads": torch.get_num_threads(),
        "cuda_available": torch.cuda.is_available(),
        "cuda_devices": gpus,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):{width}}  {_text(value)}")


def _demo(args: argparse.Namespace) -> None:
    from .demo import run

    run(args.out, seeds=args.seeds, quick=args.quick, device=args.device)


def _bench(args: argparse.Namespace) -> None:
    from .bench import main as run

    run(args.families, json=args.json, markdown=args.markdown, quick=args.quick, device=args.device, threads=args.threads)


def _samplers(args: argparse.Namespace) -> None:
    from .sampling import samplers_table

    print(samplers_table(markdown=args.markdown))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. `argv`: the arguments, by default those of the process."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # as of `| head`, which has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        return 141
    except KeyboardInterrupt:
        problem, status = "interrupted", 130
    except (MissingExtra, OSError) as error:
        problem, status = str(error), 1
    except ValueError as error:
        problem, status = str(error), 2
    print(f"dither {args.command}: {problem}", file=sys.stderr)
    return status
