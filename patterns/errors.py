"""The exception for everything that the user can fix."""


class UserError(Exception):
    """Error that the user can fix; printed as one line, exit status 2.

    Attributes:
        where: The file, shard, key, operator or host at fault; empty if a parameter is at fault and nothing else.
        what: What is wrong, with the value.
        remedy: How to fix it, in full sentences.
        parameter: The Python name of the parameter at fault; None if the fault does not lie in a parameter. Texts name
            parameters in backticks, so that the command line can replace them by its flags.

    Example:
        >>> str(UserError("", "no method 'gard'", "Choose `gradient`.", "methods"))
        "`methods`: no method 'gard'. Choose `gradient`."
    """

    def __init__(self, where: str, what: str, remedy: str, parameter: str | None = None) -> None:
        """Keep the fields also as the exception's arguments, so that it survives a process boundary."""
        super().__init__(where, what, remedy, parameter)
        self.where, self.what, self.remedy, self.parameter = where, what, remedy, parameter

    def __str__(self) -> str:
        """Return the error as one line."""
        named = f"`{self.parameter}`" if self.parameter else ""
        return " ".join(f"{' '.join(filter(None, (named, self.where)))}: {self.what}. {self.remedy}".split())
