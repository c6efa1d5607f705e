"""The ``saex`` command: train, harvest, eval, report, info, store, pretrain.

saex train --config=experiments/quickstart.py --workdir=runs/quickstart --config.sae.k=16
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done; 2 bad input, said in one message; 3 not finite; 42 stopped by SIGTERM with all saved.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "orbax", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    args, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
    # Imported late: --help and wrong flags answer at once.
    from saex.loop import EXIT_NAN, EXIT_PREEMPTED, NotFinite, Preempted

    try:
        return args.run(args, overrides) or 0
    except NotFinite as error:
        return _say(error, EXIT_NAN)
    except Preempted as error:
        return _say(error, EXIT_PREEMPTED)
    except (ValueError, RuntimeError, FileNotFoundError, ImportError) as error:
        if not _raised_by_saex(error):
            raise  # a bug, ours or a library's: the traceback is the message
        return _say(error, EXIT_BAD_INPUT)


def _say(error: Exception, code: int) -> int:
    print(f"saex: {error}", file=sys.stderr)
    return code


def _raised_by_saex(error: Exception) -> bool:
    """Whether the error comes from a check of ours, rather than out of a library."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("saex.")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = argparse.ArgumentParser(prog="saex", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        if config:
            sub.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
            sub.epilog = "--config.PATH=VALUE overrides a field, such as --config.sae.k=64"
        return sub

    sub = add("train", _train, "harvest, train, evaluate and report, or go on where it stopped")
    sub.add_argument("--workdir", metavar="DIR")
    sub.add_argument("--dry_run", action="store_true", help="print the plan and touch no data")
    sub.add_argument(
        "--hardware", metavar="NAME", help="dry run: the memory held on: v5e, v5p, v6e, cpu"
    )
    sub.add_argument("--extend", action="store_true", help="allow a larger budget than before")
    sub.add_argument("--allow_config_change", action="store_true")
    sub = add("harvest", _harvest, "write the stores that a run would train on, or go on with them")
    sub.add_argument("--store", required=True, metavar="DIR", help="a folder, s3://... or gs://...")
    sub = add("pretrain", _pretrain, "train a small language model such as pocket-lm")
    sub.add_argument("--workdir", required=True, metavar="DIR")
    for name, run, text in (
        ("eval", _eval, "evaluate a run's newest checkpoint; writes eval.json"),
        ("report", _report, "write a run's report.html"),
        ("info", _info, "say what a run's newest checkpoint is"),
    ):
        sub = add(name, run, text, config=False)
        sub.add_argument("workdir", metavar="RUN", nargs="?" if name == "info" else None)
        if name == "info":
            sub.add_argument("--json", action="store_true")
            sub.add_argument("--config", metavar="FILE.py[:ARG]", help="what a step would cost")
            sub.add_argument("--hardware", metavar="NAME", help="on: h200, v5e, v5p, v6e, cpu")
            sub.add_argument("--dead", type=int, default=0, help="dead latents that AuxK computes")
            sub.add_argument("--supply", type=float, help="rows a second that come at most")
            sub.add_argument("--active", type=float, help="L0, where the method has no k")

    sub = add("store", _store, "look at a store of activations, check it, merge parts", False)
    sub.add_argument("action", choices=("info", "verify", "merge", "head", "copy"))
    sub.add_argument("store", metavar="DIR", help="a folder, s3://... or gs://...")
    sub.add_argument("target", metavar="TO", nargs="?", help="where copy writes")
    sub.add_argument("--rows", type=int, default=5, help="rows that head shows")
    sub.add_argument("--start", type=int, default=0, help="the first of them")
    sub.add_argument("--tokenizer", metavar="FOLDER", help="of transformers, for the text of head")
    sub.add_argument("--json", action="store_true")

    plain, overrides = [], []
    rest = iter(argv)
    for arg in rest:
        if arg.startswith("--config."):
            key, equals, value = arg.removeprefix("--config.").partition("=")
            overrides.append((key, value if equals else next(rest, "")))
        else:
            plain.append(arg)
    args = parser.parse_args(plain)
    if overrides and getattr(args, "config", None) is None:
        parser.error(f"--config.{overrides[0][0]}: this command reads the run's own configuration")
    if args.run is _train and args.hardware and not args.dry_run:
        parser.error("--hardware: only --dry_run reads it; a run takes the devices that are here")
    if args.run is _info and (args.workdir is None) == (args.config is None or not args.hardware):
        parser.error("info: give a RUN, or --config=FILE --hardware=NAME for what a step costs")
    return args, overrides


def _train(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int | None:
    from saex import config as configs

    config = configs.load(args.config, overrides)
    if args.dry_run:
        print(configs.describe(config, args.hardware))
        return 0
    if not args.workdir:
        raise configs.ConfigError("--workdir=DIR is needed: the folder that the run writes into")
    _use_devices(config.mesh.size, config.live.devices)
    from saex import distributed, loop
    from saex.evals import table

    result = loop.train(config, args.workdir, args.extend, args.allow_config_change)
    if distributed.is_main():
        for name, scores in result.get("members", {"": result}).items():
            print(f"{args.workdir}/members/{name}" if name else "", table(scores), sep="\n")
        where = f"{args.workdir}/members/*" if "members" in result else args.workdir
        print(f"{where}: eval.json, report.html, metrics.jsonl, checkpoints/")
    return 0


def _harvest(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from saex import config as configs

    config = configs.load(args.config, overrides)
    _use_devices(1)
    from saex import distributed, loop

    stores = loop.harvest(config, args.store)
    if distributed.is_main():
        for store in stores:
            print(f"{store.path}: {store.rows:,} rows, columns {', '.join(store.columns)}")
        print(f"train on them by --config.store={args.store}")


def _pretrain(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from saex import pretrain

    pretrain.main_config(args.config, overrides, args.workdir)


def _eval(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from saex.evals import table
    from saex.evaluate import evaluate_run

    result = evaluate_run(args.workdir)
    for name, scores in result.get("members", {args.workdir: result}).items():
        print(name, table(scores), sep="\n")


def _report(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from saex.evaluate import report_run

    print(report_run(args.workdir))


def _info(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    if args.config is not None:
        return _cost(args, overrides)
    import pathlib

    from saex.checkpoint import info
    from saex.evaluate import member_folders

    members = member_folders(pathlib.Path(args.workdir))
    found = {str(folder): info(folder) for folder in members or [args.workdir]}
    if args.json:
        only = found if members else found[args.workdir]
        print(json.dumps(only, indent=1, sort_keys=True))
        return
    for folder, facts in found.items():
        print(f"\n{folder}" if members else "", end="\n" if members else "")
        for key, value in facts.items():
            print(f"{key:16} {value}")


def _cost(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from saex import config as configs
    from saex import cost

    config = configs.load(args.config, overrides)
    machine = cost.hardware(args.hardware)
    given = config.sae, config.stream.batch, config.mesh, machine, args.dead, config.optim.moments
    floor = cost.step(*given, max(len(config.members), 1), args.supply, args.active)
    if args.json:
        print(json.dumps(floor.to_dict(), indent=1))
        return
    mesh = f"mesh {config.mesh.data} x {config.mesh.model} ({config.mesh.strategy})"
    if config.mesh.sweep > 1:
        mesh = f"{config.mesh.sweep} places of {mesh}"
    print(f"{config.sae}\n{config.stream.batch:,} rows a step, {mesh}, {machine.name}\n")
    print(f"{floor}\n\n{cost.ASSUMES}\n\n{machine.describe()}")


def _store(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from saex.data import Store, merge_parts
    from saex.data import store_tools as tools
    from saex.data.store_copy import copy_store
    from saex.models import transformer
    from saex.models.tokenizer import Pretrained

    if args.action == "copy" and not args.target:
        raise ValueError("saex store copy DIR TO: name the place to copy to")
    if args.action == "copy":
        store = copy_store(args.store, args.target)
    else:
        store = merge_parts(args.store) if args.action == "merge" else Store.open(args.store)
    if args.action == "head":
        model = store.meta.get("model")  # of a store that saex did not harvest: anything
        name = model.get("name") if isinstance(model, dict) else None
        decode = transformer.decode if name in ("Transformer", "Several") else None
        if args.tokenizer:
            decode = Pretrained(args.tokenizer).decode
        rows = tools.head(store, args.rows, args.start, decode)
        print(json.dumps(rows, indent=1) if args.json else tools.head_table(rows))
        return
    if args.action == "verify":
        store.verify()
        print(f"{args.store}: every byte of {store.rows:,} rows is as it was written")
        return
    print(json.dumps(tools.info(store), indent=1) if args.json else tools.info_table(store))


def _use_devices(mesh: int, besides: int = 0) -> None:
    """Join other processes; without accelerators split the CPU as the mesh asks, and `besides`."""
    import jax

    from saex import distributed

    processes = int(os.environ.get("SAEX_NUM_PROCESSES", "1"))
    if (count := mesh // processes + besides) > 1:
        jax.config.update("jax_num_cpu_devices", count)
    distributed.initialize()


if __name__ == "__main__":
    sys.exit(main())
