"""The one exception for what a user can mend."""


class UserError(Exception):
    """Something the user can mend: where it is, what is wrong, and what to do about it."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(where, what, remedy)  # as arguments, so that it survives a process boundary
        self.where, self.what, self.remedy = where, what, remedy

    def __str__(self) -> str:
        return " ".join(f"{self.where}: {self.what}. {self.remedy}".split())
