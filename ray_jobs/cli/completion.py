"""Completion of the command line as a shell script that holds all words, because importing torch takes seconds."""

import os
from pathlib import Path
from typing import Any

from patterns import UserError

# zsh runs bash's completions by bashcompinit. If no word fits, `-o default` offers files.
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
    """Return the script that completes the commands of a program and the options of each command."""
    cases = {"'1 '*": [*program.commands, *list_flags(program)]}
    cases |= {f"*' {name} -'*": list_flags(command) for name, command in program.commands.items()}
    lines = [f"        {case}) words='{' '.join(words)}' ;;" for case, words in cases.items()]
    return SCRIPT.replace("CASES", "\n".join(lines))


def list_flags(command: Any) -> list[str]:
    """Return the flags of a command, without hidden ones."""
    shown = (parameter for parameter in command.params if not getattr(parameter, "hidden", False))
    spellings = (word for parameter in shown for word in (*parameter.opts, *parameter.secondary_opts))
    return ["--help", *(word for word in spellings if word.startswith("-"))]


def install(text: str) -> Path:
    """Write the script for this user and let the shell source it. Return the start-up file of the shell.

    Raises:
        UserError: If the shell is neither bash nor zsh.
    """
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in ("bash", "zsh"):
        raise UserError("--install-completion", f"the shell is {shell!r}, not bash or zsh", "Use --show-completion.")
    path = Path.home() / ".local" / "share" / "patternnet" / "completion.sh"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    start_up = Path.home() / f".{shell}rc"
    line = f"source '{path}'\n"
    if not (start_up.exists() and line in start_up.read_text()):
        with start_up.open("a") as file:
            file.write(f"\n{line}")
    return start_up
