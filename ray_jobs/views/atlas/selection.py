"""Select samples of an atlas by an expression over the columns of samples.parquet.

An expression is made of comparisons `COLUMN OPERATOR VALUE` with `and`, `or`, `not` and parentheses. The operators are
= (or ==), !=, <, <=, > and >=. A value is a number, a text in quotes, another column, or `null`.
"""

import operator
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from patterns import UserError

TOKEN = re.compile(r"\s*(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)|(?P<text>'[^']*'|\"[^\"]*\")"
                   r"|(?P<name>[A-Za-z_]\w*)|(?P<sign><=|>=|==|!=|=|<|>|\(|\)))")  # fmt: skip
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MAX_DEPTH = 50  # of parentheses and `not`


def parse_expression(text: str, schema: pa.Schema) -> pc.Expression:
    """Return an expression as a filter of a table.

    Args:
        text: The expression.
        schema: The columns.

    Raises:
        UserError: If the text has another form, a column does not exist, or a value has the wrong type.

    Example:
        >>> schema = pa.schema([("class", pa.int64()), ("cluster", pa.int32())])
        >>> table = pa.table({"class": [1, 1, 2], "cluster": [0, 1, 1]}, schema)
        >>> table.filter(parse_expression("class=1 and not cluster=0", schema)).to_pylist()
        [{'class': 1, 'cluster': 1}]
    """
    return Parser(text, schema).parse()


class Parser:
    """A parser by recursive descent.

    Args:
        text: The expression.
        schema: The columns.
    """

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema, self.depth = text, schema, 0
        self.tokens, self.position = self.split(), 0

    def error(self, what: str, remedy: str = "Write for example 'class=17 and cluster=2'.") -> UserError:
        """Return the error for the expression."""
        return UserError(self.text, what, remedy, "expression")

    def split(self) -> list[tuple[str, str]]:
        """Return the kind and the text of each token."""
        tokens, position = [], 0
        while self.text[position:].strip():
            found = TOKEN.match(self.text, position)
            if found is None or found.lastgroup is None:
                raise self.error(f"{self.text[position:].strip()[:20]!r} cannot be read")
            tokens.append((found.lastgroup, found[found.lastgroup]))
            position = found.end()
        return tokens

    def peek(self) -> tuple[str, str]:
        """Return the next token; empty at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ("", "")

    def take(self) -> tuple[str, str]:
        """Return the next token and go on to the one after it."""
        token = self.peek()
        self.position += 1
        return token

    def word(self, word: str) -> bool:
        """Return whether the next token is a word of the grammar, and if so, take it."""
        kind, text = self.peek()
        found = kind == "name" and text.lower() == word
        self.position += found
        return found

    def parse(self) -> pc.Expression:
        """Return the whole expression."""
        found = self.disjunction()
        if self.peek()[0]:
            raise self.error(f"{self.peek()[1]!r} is not expected after a comparison")
        return found

    def disjunction(self) -> pc.Expression:
        """Parse terms with `or`."""
        found = self.conjunction()
        while self.word("or"):
            found = found | self.conjunction()
        return found

    def conjunction(self) -> pc.Expression:
        """Parse factors with `and`."""
        found = self.factor()
        while self.word("and"):
            found = found & self.factor()
        return found

    def factor(self) -> pc.Expression:
        """Parse a comparison, a negation or an expression in parentheses."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"it is nested deeper than {MAX_DEPTH} levels")
        if self.word("not"):
            found = ~self.factor()
        elif self.peek() == ("sign", "("):
            self.take()
            found = self.disjunction()
            if self.take() != ("sign", ")"):
                raise self.error("a parenthesis is not closed")
        else:
            found = self.comparison()
        self.depth -= 1
        return found

    def comparison(self) -> pc.Expression:
        """Parse a comparison of a column."""
        kind, name = self.take()
        if kind != "name":
            raise self.error(f"{name!r} is no column" if name else "a comparison is missing at the end")
        column = self.column(name)
        kind, sign = self.take()
        if kind != "sign" or sign not in COMPARISONS:
            raise self.error(f"no comparison follows {name}", f"Use one of {', '.join(COMPARISONS)}.")
        if self.word("null"):
            if sign not in ("=", "==", "!="):
                raise self.error(f"{name} {sign} null has no meaning", "Use = or !=.")
            return column.is_valid() if sign == "!=" else column.is_null()
        return COMPARISONS[sign](column, self.value(name))

    def column(self, name: str) -> pc.Expression:
        """Return a column."""
        if name not in self.schema.names:
            raise self.error(f"there is no column {name!r}", f"Choose from {', '.join(self.schema.names)}.")
        return pc.field(name)

    def value(self, name: str) -> Any:
        """Return the value that a column is compared with."""
        kind, text = self.take()
        is_text = pa.types.is_string(self.schema.field(name).type)
        if kind == "name":
            other = self.column(text)
            if pa.types.is_string(self.schema.field(text).type) != is_text:
                raise self.error(f"{name} cannot be compared with {text}")
            return other
        if kind not in ("number", "text") or (kind == "text") != is_text:
            wanted = "a text in quotes" if is_text else "a number"
            raise self.error(f"{name} is compared with {text!r}, not with {wanted}")
        if kind == "text":
            return text[1:-1]
        if re.search(r"[.eE]", text):
            return float(text)
        try:
            return pa.scalar(int(text), pa.int64()).as_py()
        except (OverflowError, ValueError) as error:  # ValueError: more digits than Python reads
            raise self.error(f"{name} is compared with {text[:30]}, which needs more than 64 bits") from error
