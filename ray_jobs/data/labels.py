"""Files of labels: find the label of each image of a folder.

A file holds one label per line, or a table with a column of image names, with or without a heading, separated by white
space, tabs, commas, semicolons or bars. An ambiguous file is an error, because a wrong label would spoil every result.
"""

import codecs
import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from ray_jobs.data.samples import IMAGES, ShardError, extension_of

MAX_CLASS = 2**31
UNLABELED = -1  # Hugging Face's value for a missing label
# Headings of a column of labels, the preferred ones first.
HEADINGS = (
    *("label", "labels", "class_index", "class_id", "classid", "class_idx", "label_id", "target", "cls", "class"),
    *("fine_label", "category_id", "category", "y", "class_name", "classname", "wnid", "synset", "predictionstring"),
)
NAME_HEADINGS = (
    *("image", "images", "image_id", "imageid", "image_name", "img", "file", "filename", "file_name", "fname", "name"),
    *("path", "filepath", "file_path", "image_path", "id", "key"),
)
NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?")
# ImageNet's LOC_val_solution.csv: one or several pairs of a class and a box.
CLASS_AND_BOXES = re.compile(r"(\S+)(?:\s+-?\d+){4}(?:\s+\S+(?:\s+-?\d+){4})*")
COMMENT = re.compile(r"#(\s|$)")
BOX = 4  # numbers that follow the class in Tiny ImageNet's val_annotations.txt
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
MAX_EXAMINED_LINES = 1000  # from which separator and columns are detected
MAX_SHOWN = 60  # characters of a line in a message

Row = list[str]


def number_classes(names: Iterable[str]) -> dict[str, int]:
    """Return the class number of each name.

    If the names are class numbers and all different (7 and 007 are equal), each name is its own number. Otherwise the
    sorted names are numbered from 0, as in torchvision.

    Args:
        names: The names of the classes; repeated names count once.

    Returns:
        The numbers by name, in the order of the numbers.

    Example:
        >>> number_classes(["dog", "cat"]), number_classes(["10", "2"])
        ({'cat': 0, 'dog': 1}, {'2': 2, '10': 10})
    """
    ordered = sorted(set(names))
    numbers = {name: int(name) for name in ordered if re.fullmatch("[0-9]{1,20}", name) and int(name) < MAX_CLASS}
    if len(set(numbers.values())) == len(ordered):
        return dict(sorted(numbers.items(), key=lambda item: item[1]))
    return {name: number for number, name in enumerate(ordered)}


def parse_labels(data: bytes, images: Sequence[str], folder: str) -> list[int | None]:
    """Return the label of each image of a folder from its file of labels.

    Args:
        data: The bytes of the file, UTF-8, or UTF-16 with a byte order mark.
        images: The paths of the images in the folder, sorted.
        folder: The folder's own name, which may precede the names of images.

    Returns:
        One label per image; None for an image that the file omits.

    Raises:
        ShardError: If the file names no image, or its labels are ambiguous.

    Example:
        >>> parse_labels(b"b.jpg 7", ["a.jpg", "b.jpg"], "val")
        [None, 7]
    """
    lines = [line for line in decode_text(data).splitlines() if line.strip() and not COMMENT.match(line)]
    if not lines:
        raise ShardError("the file of labels is empty")
    names = ImageNames(images, folder)
    layout = detect_layout(lines[:MAX_EXAMINED_LINES], names) or detect_layout(lines, names)
    if layout is None:
        labels = parse_one_per_line(lines, names)
        numbers = parse_class_numbers(labels)
        return [numbers[label] for label in labels]
    separate, column = layout
    rows = separate(lines)
    heading = rows[0] if is_heading(rows, column, names) else None
    rows = rows[heading is not None :]
    label = find_label_column(heading, rows, column)
    found: dict[str, tuple[int, str]] = {}
    for row in rows:
        if len(row) <= max(column, label):
            raise ShardError(f"a line has no label: {' '.join(row)[:MAX_SHOWN]!r}")
        if (named := names.find(row[column])) is None:
            continue
        if named.other is not None:
            raise ShardError(f"{row[column]!r} names several images: {named.image} and {named.other}")
        rank, text = found.get(named.image, (-1, ""))
        if rank == named.rank and text != row[label].strip():
            raise ShardError(
                f"two labels for {named.image}: {text[:MAX_SHOWN]!r} and {row[label].strip()[:MAX_SHOWN]!r}"
            )
        if rank < named.rank:
            found[named.image] = named.rank, row[label].strip()
    # Classes are numbered over all lines, because the folder may hold only some of the images.
    numbers = parse_class_numbers(row[label].strip() for row in rows)
    return [numbers[found[image][1]] if image in found else None for image in images]


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark."""
    encoding = next((name for mark, name in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ShardError("the file of labels is not UTF-8 text; save it as UTF-8") from error


class NamedImage(NamedTuple):
    """The image that an entry of a file of labels names.

    Attributes:
        image: The path of the image.
        other: Another image that the entry may also mean; None if the entry is unambiguous.
        rank: 2 if the entry is the image's path, 1 if the folder's own name precedes it, 0 for another folder's name.
        has_extension: Whether the entry includes the extension.
    """

    image: str
    other: str | None
    rank: int
    has_extension: bool


class ImageNames:
    """Index of a folder's images by the names that files of labels use."""

    def __init__(self, images: Sequence[str], folder: str) -> None:
        """Index images by their paths in a folder with this name."""
        self.images, self.folder = images, folder

    @cached_property
    def exact(self) -> list[dict[str, tuple[str, str | None]]]:
        """The tables of names as they are."""
        return list(self.build_tables(str))

    @cached_property
    def any_case(self) -> list[dict[str, tuple[str, str | None]]]:
        """The tables of names in lower case."""
        return list(self.build_tables(str.casefold))

    def build_tables(self, fold: Callable[[str], str]) -> Iterator[dict[str, tuple[str, str | None]]]:
        """Yield the images by path, path without extension, file name, and file name without extension."""
        name_forms: list[Callable[[str], str]] = [str]
        if any("/" in image for image in self.images):
            name_forms.append(file_name)
        for name_form in name_forms:
            for extension_form in (str, strip_extension):
                table: dict[str, tuple[str, str | None]] = {}
                for image in self.images:
                    key = fold(extension_form(name_form(image)))
                    table[key] = (image, None) if key not in table else (table[key][0], image)
                yield table

    def find(self, entry: str) -> NamedImage | None:
        """Return the image that an entry names; None if it names no image."""
        entry = entry.strip()
        slashes = entry.replace("\\", "/")
        for any_case, path in ((False, entry), (False, slashes), (True, slashes.casefold())):
            parts = [part for part in path.split("/") if part not in ("", ".")]
            for first in range(len(parts)):
                name = "/".join(parts[first:])
                rank = 2 if first == 0 else int(parts[first - 1] == self.folder)
                for number, table in enumerate(self.any_case if any_case else self.exact):
                    if name in table:
                        return NamedImage(*table[name], rank, number % 2 == 0)
        return None


def file_name(path: str) -> str:
    """Return the last component of a path."""
    return path.rpartition("/")[2]


def strip_extension(path: str) -> str:
    """Return a path without its extension."""
    return path.rpartition(".")[0]


def split_at(character: str) -> Callable[[Sequence[str]], list[Row]]:
    """Return a function that splits lines at a character."""
    return lambda lines: list(csv.reader(lines, delimiter=character, skipinitialspace=True))


def split_at_spaces(lines: Sequence[str]) -> list[Row]:
    """Split lines at white space; names with spaces are in quotes."""
    return list(csv.reader([" ".join(line.split()) for line in lines], delimiter=" "))


def split_off_last_word(lines: Sequence[str]) -> list[Row]:
    """Split lines into names, which may have spaces, and labels of one word."""
    return [line.rsplit(None, 1) for line in lines]


SEPARATORS: tuple[Callable[[Sequence[str]], list[Row]], ...] = (
    *map(split_at, "\t,;|"),
    split_off_last_word,
    split_at_spaces,
)
Layout = tuple[Callable[[Sequence[str]], list[Row]], int]


def detect_layout(lines: Sequence[str], names: ImageNames) -> Layout | None:
    """Return how to split lines and which column names images; None if no column does."""
    best, layout = 0, None
    for separate in SEPARATORS:
        rows = separate(lines)
        for column in range(max(map(len, rows)) if max(map(len, rows)) > 1 else 0):
            found = [names.find(row[column]) for row in rows if len(row) > column]
            # A name without its extension may be a number that is a label, so that it counts less.
            score = sum(1 + named.has_extension for named in found if named is not None)
            if score > best:
                best, layout = score, (separate, column)
    return layout


def is_heading(rows: Sequence[Row], column: int, names: ImageNames) -> bool:
    """Return whether the first row is a heading instead of an image and its label."""
    words = normalize_heading(rows[0])
    if column < len(words) and words[column] in NAME_HEADINGS and {*HEADINGS} & set(words):
        return True  # even if an image has this name
    if column >= len(words) or names.find(rows[0][column]) is not None or extension_of(words[column]) in IMAGES:
        return False
    rest = [row[column] for row in rows[1:MAX_EXAMINED_LINES] if len(row) > column]
    if any(extension_of(name) in IMAGES for name in rest) or {*HEADINGS, *NAME_HEADINGS} & set(words):
        return True
    return all(names.find(name) is not None for name in rest)


def normalize_heading(row: Row) -> list[str]:
    """Return the words of a heading in lower case, with underscores."""
    return [word.strip().casefold().replace(" ", "_") for word in row]


def find_label_column(heading: Row | None, rows: Sequence[Row], names: int) -> int:
    """Return the column of the labels.

    Args:
        heading: The heading; None if there is no heading.
        rows: The other rows.
        names: The column of the image names.

    Raises:
        ShardError: If it is not clear which column holds the labels.
    """
    width = max(map(len, [*rows, heading or []]))
    columns = [column for column in range(width) if column != names]
    if heading is not None:
        words = normalize_heading(heading)
        found = [words.index(word) for word in HEADINGS if word in words and words.index(word) != names]
        if found:
            return found[0]
    if len(columns) == 1:
        labels = [row[columns[0]].strip() for row in rows if len(row) > columns[0]]
        # Numbers before the names count the lines; other values that differ in every line are captions or file names.
        if are_all_different(labels) and (columns[0] < names or not are_numbers(labels)):
            raise ShardError(
                f"every image has a different label ({labels[0][:MAX_SHOWN]!r}, …), so that they are not classes"
            )
        return columns[0]
    boxes = [row[-BOX:] for row in rows]
    if names == 0 and len(columns) == 1 + BOX and all(map(are_numbers, boxes)):
        return 1
    what = f"{len(columns)} columns may hold the labels ({' '.join(rows[0])[:MAX_SHOWN]!r})"
    raise ShardError(f"{what}; write the heading `label` above the right one")


def are_numbers(values: Iterable[str]) -> bool:
    """Return whether all values are whole numbers."""
    return all(NUMBER.fullmatch(value.strip()) for value in values)


def are_all_different(values: Sequence[str]) -> bool:
    """Return whether there are more than two values and no two are equal."""
    return len(values) > 2 and len(set(values)) == len(values)


def parse_one_per_line(lines: Sequence[str], names: ImageNames) -> list[str]:
    """Return the labels of a file with one label per line, in the order of the sorted images."""
    labels = [line.strip() for line in lines]
    if len(labels) == len(names.images) + 1 and labels[0].casefold() in HEADINGS:
        labels = labels[1:]
    first = file_name(names.images[0]).casefold()
    for label in labels:
        if not NUMBER.fullmatch(label) and (names.find(label) or first in label.casefold()):
            raise ShardError(f"a line names an image, but its label is not recognized: {label[:MAX_SHOWN]!r}")
    if len(labels) != len(names.images):
        what = f"{len(labels)} labels for {len(names.images)} images, and no line names an image"
        raise ShardError(f"{what} ({labels[0][:MAX_SHOWN]!r})")
    if are_all_different(labels) and not are_numbers(labels):
        raise ShardError(f"no line names an image, and every line is different ({labels[0][:MAX_SHOWN]!r}, …)")
    return labels


def parse_class_numbers(labels: Iterable[str]) -> dict[str, int | None]:
    """Return the class number of each label of a file; None for an empty label and for -1.

    Raises:
        ShardError: If the labels are numbers and one of them is not a class number.
    """
    class_of = {label: boxes[1] if (boxes := CLASS_AND_BOXES.fullmatch(label)) else label for label in labels}
    classes = {name for name in class_of.values() if name not in ("", "-1")}
    if not are_numbers(classes):
        numbers = number_classes(classes)
    else:
        numbers = {name: int(name.partition(".")[0]) for name in classes}
        if wrong := next((name for name, number in sorted(numbers.items()) if not 0 <= number < MAX_CLASS), None):
            raise ShardError(f"{wrong[:MAX_SHOWN]} is not a class number")
    return {label: numbers.get(name) for label, name in class_of.items()}
