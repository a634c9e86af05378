"""Completion of the command line as a script that holds every word: to ask the program takes seconds, for torch."""

import os
from pathlib import Path
from typing import Any

from patterns import UserError

# zsh takes bash's completions by bashcompinit. Where no word fits, `-o default` offers files.
SCRIPT = """\
# Completion of patternnet for bash and zsh: source it.
if [ -n "$ZSH_VERSION" ]; then
    whence compdef >/dev/null || { autoload -Uz compinit && compinit; }
    autoload -Uz bashcompinit && bashcompinit
fi
_patternnet() {
    local current="${COMP_WORDS[COMP_CWORD]}" words=
    case "$COMP_CWORD ${COMP_WORDS[1]} $current" in
CASES
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _patternnet patternnet
"""


def script(program: Any) -> str:
    """The script that completes a first word and each command's options, of a program as its parser has it."""
    cases = {"'1 '*": [*program.commands, *options(program)]}
    cases |= {f"*' {name} -'*": options(command) for name, command in program.commands.items()}
    lines = [f"        {case}) words='{' '.join(words)}' ;;" for case, words in cases.items()]
    return SCRIPT.replace("CASES", "\n".join(lines))


def options(command: Any) -> list[str]:
    spellings = (word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts))
    return ["--help", *(word for word in spellings if word.startswith("-"))]


def install(text: str) -> Path:
    """Keep the script for this user, and have the shell source it. Gives the shell's file."""
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in ("bash", "zsh"):
        raise UserError("--install-completion", f"the shell is {shell!r}, not bash or zsh", "Use --show-completion.")
    kept = Path.home() / ".local" / "share" / "patternnet" / "completion.sh"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(text)
    starts = Path.home() / f".{shell}rc"
    line = f"source '{kept}'\n"
    if not (starts.exists() and line in starts.read_text()):
        with starts.open("a") as file:
            file.write(f"\n{line}")
    return starts
