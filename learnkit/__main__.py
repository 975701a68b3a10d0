"""The command line: `learnkit info FILE` and `learnkit predict FILE IMAGES…`, for files that `learn.export` wrote."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from learnkit.export.predictor import load_learner


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: arguments; None: those of the process

    Returns:
        The exit code: 0, or 1 if a file could not be used; the reason is printed to stderr.
    """
    given = parser().parse_args(arguments)
    try:
        print_info(given.file) if given.command == "info" else print_predictions(given.file, given.images, given.top)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"learnkit: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="learnkit", description="Use models that learn.export wrote to .pt2 or .onnx files."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="show information about the model in a file")
    predict = commands.add_parser("predict", help="show the most probable classes of pictures, one picture per line")
    for command in (info, predict):
        command.add_argument("file", help="a .pt2 or .onnx file")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument("--top", type=int, default=1, help="number of classes to show (default: 1)")
    return parser


def print_info(file: str) -> None:
    info = load_learner(file).info
    for entry in info["inputs"]:
        print(f"input       {entry['name']}: {entry['dtype']} {tuple(entry['shape'])} per sample")
    print(f"model       {info['model']}, {info['parameters']:,} parameters")
    classes = info["classes"] or []
    if classes:
        print(f"classes     {len(classes)}: {', '.join(classes[:12])}{', …' if len(classes) > 12 else ''}")
    if info["stats"]:
        print(f"normalized  with means {info['stats'][0]}, standard deviations {info['stats'][1]}")
    for name, value in info["values"].items():
        print(f"{name:11} {value:.6g}" if value is not None else f"{name:11} -")
    print(f"written by  learnkit {info['learnkit']}, torch {info['torch']}")


def print_predictions(file: str, images: Sequence[str], top: int) -> None:
    predictor = load_learner(file)
    for image in images:
        found = list(predictor.predict_image(image).items())[: max(1, top)]
        print(f"{image}\t" + "\t".join(f"{name} {share:.4f}" for name, share in found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
