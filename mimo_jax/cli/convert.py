"""`mimo convert`: its flags, and the functions that they call."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mimo_jax.cli.arg_types import InputPath, OutputPath
from mimo_jax.errors import EXIT_OK

EXAMPLES = {
    "import": """examples:
  mimo convert import --config configs/mimo_7b.py --vision CLIP-ViT-H-14 --llm vicuna-7b-v1.5 --sam sam_vit_h_4b8939.pth --out import
  mimo convert import --config configs/mimo_7b.py --vision CLIP --llm VICUNA --sam SAM.pth --lora ADAPTER --lora-alpha 8 --out import
  mimo convert import --config configs/lite.py --llm SmolLM2-135M-Instruct.Q4_1.gguf --sam lite_medsam.pth --out import
  mimo convert import --config configs/lisa_7b.py --joint LISA-7B-v1 --vision clip-vit-large-patch14 --out lisa
  mimo convert import --config configs/mimo_7b.py --joint MODEL --key-map rows.json --out import

A row of a key map is [torch key, parameter path] or [torch key, parameter path, op], with {llm_layer}, {vision_layer},
{aligner_block}, … for the number of a layer; ops are identity, linear, conv, conv_transpose, squeeze.""",
    "export": """examples:
  mimo convert export --checkpoint runs/b --format hf --out exported        # vision/ and llm/; LoRA merged into llm/
  mimo convert export --checkpoint runs/b --format peft --out adapter       # LoRA alone, for llm/ of --format hf --lora apart
  mimo convert export --checkpoint runs/b --format sam --out sam            # sam_vit_h.pth
  mimo convert export --checkpoint runs/b --format joint --lora apart --out whole
  mimo convert export --checkpoint runs/b --format mimo --out model         # one self-contained directory""",
    "inspect": """examples:
  mimo convert inspect sam_vit_h_4b8939.pth
  mimo convert inspect vicuna-7b-v1.5 --config configs/mimo_7b.py
  mimo convert inspect runs/b""",
    "roundtrip": """examples:
  mimo convert roundtrip --config configs/mimo_7b.py --workdir /scratch/roundtrip
  mimo convert roundtrip --config configs/tiny.py --workdir roundtrip""",
}


def add_verbs(convert: argparse.ArgumentParser) -> None:
    """Add the verbs of `mimo convert` to its parser."""
    verbs = convert.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=description, epilog=EXAMPLES[name])

    add = verb(
        "import",
        "convert PyTorch checkpoints to a mimo_jax checkpoint",
        "Convert PyTorch checkpoints to a mimo_jax checkpoint that computes the same. Tensors that are missing, left over or of another "
        "shape are listed, and then nothing is written. Config fields are set as in `mimo train`: --config.model.llm.vocab_size=32002.",
    )
    add.add_argument(
        "--config", type=InputPath, required=True, metavar="FILE", help="a config file, or a packaged one, such as configs/mimo_7b.py"
    )
    add.add_argument("--vision", type=InputPath, metavar="PATH", help="CLIP vision tower in the layout of transformers or open_clip")
    add.add_argument("--llm", type=InputPath, metavar="PATH", help="Llama, Vicuna or SmolLM2 with its tokenizer, or as a GGUF file")
    add.add_argument("--sam", type=InputPath, metavar="PATH", help="SAM or MedSAM in the layout of segment-anything or transformers")
    add.add_argument("--lora", type=InputPath, metavar="PATH", help="a PEFT adapter of --llm")
    add.add_argument("--lora-alpha", type=float, metavar="A", help="alpha of the LoRA weights, if there is no adapter_config.json")
    add.add_argument("--lora-base", metavar="NAME", help="the adapter's base_model_name_or_path, if --llm has another name")
    add.add_argument("--sam-family", metavar="NAME", help="sam, medsam, sam-med2d or other: whose SAM it is, if its name does not show it")
    add.add_argument("--joint", type=InputPath, metavar="PATH", help="a whole model: LISA, GLaMM, MIMO")
    add.add_argument("--overlay", type=InputPath, metavar="PATH", help="tensors that replace those of the other sources")
    add.add_argument("--key-map", type=InputPath, metavar="FILE", help="JSON rows in addition to the tables, for --joint and --overlay")
    add.add_argument("--seed", type=int, default=0, metavar="N", help="seed of parameters that no source has; default: 0")
    add.add_argument("--allow-missing", action="append", default=[], metavar="REGEX", help="tensors that may be missing; repeatable")
    add.add_argument("--ignore-extra", action="append", default=[], metavar="REGEX", help="tensors that may be left over; repeatable")
    add.add_argument("--ignore-setting", action="append", default=[], metavar="KEY", help="unknown key of a config.json; repeatable")
    add.add_argument("--allow-nonfinite", action="store_true", help="import tensors with NaN or Inf unchanged")
    add.add_argument("--out", type=OutputPath, required=True, metavar="DIR", help="folder of the checkpoint; must be new or empty")
    add.set_defaults(run=_import, overrides=())

    out = verb("export", "convert to PyTorch, or to one self-contained directory", "Write a checkpoint in the formats of other libraries.")
    out.add_argument(
        "--checkpoint",
        type=InputPath,
        required=True,
        metavar="PATH",
        help="a run directory (its newest complete step), one step, or an import",
    )
    out.add_argument("--base", type=InputPath, metavar="DIR", help="folder of the frozen base, if it was moved")
    out.add_argument("--format", required=True, choices=("hf", "peft", "sam", "joint", "mimo"), help="see the examples")
    out.add_argument("--lora", default="merged", choices=("merged", "apart"), help="hf, joint: merge LoRA or keep it separate")
    out.add_argument(
        "--dtype", default="", choices=("float32", "bfloat16", "float16"), help="hf, joint with LoRA merged: dtype of the language model"
    )
    out.add_argument("--out", type=OutputPath, required=True, metavar="DIR", help="output folder; must be new or empty")
    out.set_defaults(run=_export)

    look = verb("inspect", "describe a file of weights", "Describe a file or folder of weights, and compare it with a config.")
    look.add_argument("path", type=InputPath, metavar="PATH", help="a file, a folder of weights, or a mimo_jax checkpoint")
    look.add_argument("--config", type=InputPath, metavar="FILE", help="compare with this config: missing and left-over tensors")
    look.add_argument("--key-map", type=InputPath, metavar="FILE", help="JSON rows in addition to the tables")
    look.add_argument("--json", action="store_true", help="print JSON")
    look.set_defaults(run=_inspect, overrides=())

    try_out = verb(
        "roundtrip",
        "convert random weights of full size, with check and timing",
        "Make random weights of a config's full size in the original layouts, import them, check every tensor, and report the times.",
    )
    try_out.add_argument("--config", type=InputPath, required=True, metavar="FILE", help="a config file")
    try_out.add_argument(
        "--workdir", type=OutputPath, required=True, metavar="DIR", help="working folder; sources/ and import/ are kept there"
    )
    try_out.set_defaults(run=_roundtrip, overrides=())


def _config(args: argparse.Namespace):
    from mimo_jax.config_flags import load_config

    return load_config(["--config", args.config, *args.overrides])


def _import(args: argparse.Namespace) -> int:
    from checkpoints_convert.convert import ImportRequest, import_checkpoint
    from checkpoints_convert.sources import SOURCES

    import_checkpoint(
        ImportRequest(
            config=_config(args),
            given={name: Path(getattr(args, name)) for name in SOURCES if getattr(args, name) is not None},
            out=Path(args.out),
            seed=args.seed,
            key_map=Path(args.key_map) if args.key_map else None,
            lora_alpha=args.lora_alpha,
            lora_base=args.lora_base,
            sam_family=args.sam_family,
            allow_missing=args.allow_missing,
            ignore_extra=args.ignore_extra,
            ignore_setting=args.ignore_setting,
            allow_nonfinite=args.allow_nonfinite,
        )
    )
    return EXIT_OK


def _export(args: argparse.Namespace) -> int:
    from checkpoints_convert.export import export_checkpoint

    merge = args.lora == "merged"
    for line in export_checkpoint(args.checkpoint, args.format, Path(args.out), base_path=args.base, merge=merge, dtype=args.dtype):
        print(line)
    return EXIT_OK


def _inspect(args: argparse.Namespace) -> int:
    from checkpoints_convert.inspect import describe, inspect

    found = inspect(Path(args.path), _config(args) if args.config else None, Path(args.key_map) if args.key_map else None)
    print(json.dumps(found, indent=1) if args.json else describe(found))
    return EXIT_OK


def _roundtrip(args: argparse.Namespace) -> int:
    from checkpoints_convert.roundtrip import roundtrip

    return roundtrip(_config(args), Path(args.workdir))
