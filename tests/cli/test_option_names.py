"""The names of every command's options and arguments, which scripts and documentation rely on."""

import pytest
import typer

from pysteer.cli import app

COMMON = "--json --debug"
NAMES = {
    "demo": """
        --prompts --show --category --forced --strength --max-tokens -n --threads -t --gpu-layers
        --rpc
    """,
    "extract": """
        --unsafe --safe --output -o --model -m --method --variant --paired --option --layers --site
        --pooling --safe-data --benign --answers --judge --response-tokens --mask-massive
        --no-mask-massive --top-k --orthogonalise --unit-norm --scale --router --no-router --gates
        --false-positive-rate --held-out --seed --engine --dtype --device-map --context --cache
        --threads -t --gpu-layers --rpc --force --chat-format
    """,
    "calibrate": """
        --unsafe --benign --output -o --safe --answers --model -m --methods --layers
        --category-steps --scopes --strengths --minutes --trials --hold-out --max-degenerate
        --max-benign-change --max-look-alike --max-leak --judge --max-tokens -n --parallel --engine
        --plot --cache --seed --context --threads -t --gpu-layers --rpc --force --chat-format
    """,
    "generate": """
        --prompt -p --model -m --pack -s --steer --policy --system --raw --max-tokens -n
        --temperature --seed --context --threads -t --gpu-layers --rpc --chat-format
    """,
    "chat": """
        --model -m --pack -s --steer --policy --system --max-tokens -n --temperature --seed
        --context --threads -t --gpu-layers --rpc --chat-format
    """,
    "evaluate": """
        --prompts --output -o --model -m --pack -s --benign --steer --policy --strengths --isolation
        --judge --reward --fluency --no-fluency --limit --parallel --max-tokens -n --temperature
        --seed --context --threads -t --gpu-layers --rpc --force --chat-format
    """,
    "inspect": "file --plot --force --verbose",
    "compare": "first second",
    "doctor": "--model -m --threads -t --gpu-layers --rpc --report --force",
}


def names(command):
    return [name for each in command.params for name in (*each.opts, *each.secondary_opts)]


def test_command_names_equal_the_pinned_list():
    assert set(typer.main.get_command(app).commands) == set(NAMES)


@pytest.mark.parametrize("command", NAMES)
def test_command_has_the_pinned_options(command):
    found = names(typer.main.get_command(app).commands[command])
    assert sorted(found) == sorted(f"{NAMES[command]} {COMMON}".split())


def test_shared_options_have_one_help_in_all_commands():
    helps = {}
    for command in NAMES:
        for each in typer.main.get_command(app).commands[command].params:
            if {*each.opts} & {"--gpu-layers", "--rpc", "--threads", "--chat-format"}:
                helps.setdefault(each.opts[0], set()).add((each.help, each.default, each.metavar))
    assert {name: len(found) for name, found in helps.items()} == dict.fromkeys(
        ("--gpu-layers", "--rpc", "--threads", "--chat-format"), 1
    )
