"""Captioned sets of a protocol: COCO's files, folders, lists, data sets of Hugging Face, prompts alone; and what is chosen of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddil_lightning.data.folders import IMAGES, METADATA, Row, columns_of, list_folder, read_column, read_rows, table_rows, walk
from ddil_lightning.data.tables import kind_of, load_prompts
from ddil_lightning.evaluation.galleries import Gallery
from ddil_lightning.evaluation.metrics.pairs import COLUMNS, check_there, choose, coco
from ddil_lightning.evaluation.protocols import PromptSource
from ddil_lightning.texts import caption_texts, file_text, parse_json, place, read_lines, read_text, shown

LISTS = (".jsonl", ".csv", ".json", ".txt")
ADVICE = {
    "name them with image= and caption=": "name them by --image_column and --caption_column (in a protocol prompts.image, prompts.caption)",
    "name another with caption=": "name another by --caption_column (in a protocol prompts.caption)",
}
"""What is said of data where options are called otherwise."""
WHERE = "; say where by --images (in a protocol prompts.images)"
"""What is said of pictures that are not where a file of captions has them."""
Notes = Sequence[Mapping[str, Any]]
"""What a file says of prompts besides, the row of each: GenEval's classes and counts, the ids of DPG-Bench."""


class Captioned(NamedTuple):
    """Captions by picture; of prompts alone one each, and no pictures.

    `names`: what a list may call each picture. `notes`: the row of each caption, of those sets that have rows.
    """

    captions: list[list[str]]
    pictures: Gallery | None = None
    names: Sequence[tuple[str, ...]] = ()
    notes: Sequence[Notes] = ()


class Chosen(NamedTuple):
    """Prompts, and the pictures that they are of, each once; `every`: all pictures of the set; `notes`: of each prompt, or none.

    `groups`: where a picture has several of the prompts, the number of its picture for each.
    """

    prompts: list[str]
    pictures: Gallery | None
    every: Gallery | None
    about: str
    notes: Notes = ()
    groups: Sequence[int] = ()


def read_set(source: PromptSource, there: bool = True) -> Captioned:
    """The captioned set that a protocol names. `there`: whether its pictures will be read, and so must be there.

    Raises FileNotFoundError for what is missing and ValueError for what cannot be understood, for a column that is named and not there and
    for a split of what has none.
    """
    try:
        found = _read(source, there and source.image is not None)
    except ValueError as error:
        for theirs, ours in ADVICE.items():
            if theirs in str(error):
                raise ValueError(str(error).replace(theirs, ours)) from error
        raise
    return found if source.image is not None else found._replace(pictures=None)


def _read(source: PromptSource, there: bool) -> Captioned:
    if isinstance(source.source, list):
        parts = [_listed(place(path), source, there) for path in source.source]
        if not parts or any(part.pictures is not None for part in parts):
            raise ValueError(
                f"prompts: {', '.join(source.source) or 'no file'}: several files are for prompts alone; name one set of images"
            )
        notes = [own for part in parts for own in part.notes] if all(part.notes for part in parts) else []
        return Captioned([texts for part in parts for texts in part.captions], notes=notes)
    file = place(source.source)
    if file.suffix.lower() in LISTS and not file.is_dir():
        return _listed(file, source, there)
    if file.is_dir() and (texts := _texts_of(file)):
        _check_named(source, file, columns=False)
        return _by_id({text.stem: read_text(text) for text in texts}, file)
    if file.is_dir() and kind_of(file, str(file))[0] == "list":
        pictures = None if source.images is None else place(source.images)
        _check_named(source, file, any(name in METADATA for _, names in walk(file) for name in names))
        return _grouped(file, list_folder(file, *_columns(source), pictures), source, there)
    return _data_set(source.source, source)


def choice(found: Captioned, source: PromptSource) -> Chosen:
    """The prompts that a protocol takes of a set. Raises ValueError for more than there are, and as `_named` does."""
    total = len(found.captions)
    if source.only is not None:
        listed = _named(found, source.only)
        places = choose(listed, source.n, source.choice)
        how = f"those that {source.only} names"
        how = how if len(places) == len(listed) else f"{len(places)} chosen by seed {source.choice} of {how}"
    else:
        places = choose(list(range(total)), source.n, source.choice)
        how = "all" if len(places) == total else f"{len(places)} of {total} chosen by seed {source.choice}"
    several = any(len(found.captions[i]) > 1 for i in places)
    taken = slice(None if source.captions == "all" else 1)
    prompts = [text for i in places for text in found.captions[i][taken]]
    rows = [row for i in places for row in found.notes[i][taken]] if found.notes else []
    notes = [{**row, "prompt": text} for row, text in zip(rows, prompts, strict=bool(rows))]
    if several:
        how += {"all": ", every caption", "first": ", the first caption of each"}.get(source.captions, "")
    groups = [i for i in places for _ in found.captions[i][taken]] if len(prompts) > len(places) else []
    pictures = found.pictures
    return Chosen(prompts, None if pictures is None else pictures.take(places), pictures, how, notes, groups)


def _named(found: Captioned, file: str) -> list[int]:
    """The places of the pictures that a list names, in its order. Raises ValueError for a name of none or of several, or a second time."""
    lines = [(number, line) for number, line in enumerate(read_lines(file), 1) if line]
    if not lines or not found.names:
        raise ValueError(f"{file} {'names images, and the prompts have none' if lines else 'names no image'}: leave prompts.only out")
    places: dict[str, list[int]] = {}
    for i, names in enumerate(found.names):
        for name in dict.fromkeys(names):
            places.setdefault(name, []).append(i)
    chosen: dict[int, int] = {}
    for number, line in lines:
        here = places.get(line, [])
        if len(here) != 1:
            raise ValueError(f"{file}, line {number}: {len(here) or 'no'} images of the set are called {line!r}: give a file's name or id")
        if here[0] in chosen:
            raise ValueError(f"{file}, line {number}: {line!r} is the image of line {chosen[here[0]]} again: name each once")
        chosen[here[0]] = number
    return list(chosen)


def _listed(file: Path, source: PromptSource, there: bool) -> Captioned:
    """The captions, and perhaps pictures, of a text, json, jsonl or csv file."""
    suffix = file.suffix.lower()
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such folder or file; give a folder of images, a .jsonl, .csv or .txt, or COCO's captions_*.json"
        )
    if suffix != ".json":
        _check_named(source, file, columns=suffix != ".txt")
    if suffix == ".txt":
        return _texts([line for line in read_lines(file) if line], file)
    if suffix == ".json":
        data = parse_json(read_text(file), str(file))
        _check_named(source, file, columns=isinstance(data, list) and any(isinstance(row, dict) for row in data))
        if isinstance(data, list) and data and all(isinstance(text, str) for text in data):
            return _texts(data, file)
        if isinstance(data, dict) and data and all(isinstance(text, str) for text in data.values()):
            return _by_id(data, file)
        if not isinstance(data, list) or not data:
            return _coco(file, data, source, there)
    images, captions = _columns(source)
    columns = columns_of(file)
    if source.image is None or (source.image == "image" and not set(images) & set(columns)):
        cells = list(read_column(file, next((name for name in captions if name in columns), captions[0])))
        return _texts(cells, file, table_rows(file))
    base = file.parent if source.images is None else place(source.images)
    return _grouped(file, read_rows(file, images, captions, base), source, there, table_rows(file))


def _columns(source: PromptSource) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that the columns of pictures and of captions may have: the protocol's own, else the usual ones."""
    images = COLUMNS[0] if source.image in (None, "image") else (source.image,)
    return images, COLUMNS[1] if source.caption is None else (source.caption,)


def _check_named(source: PromptSource, file: Path, columns: bool) -> None:
    """Raises ValueError for a split of a file or a folder that has none, and for a column of one without `columns`."""
    named = {"split": source.split} if source.split != "train" else {}
    if not columns:
        named |= {"image": source.image} if source.image not in (None, "image") else {}
        named |= {"caption": source.caption} if source.caption is not None else {}
    if named:
        said = ", ".join(f"{key} {value}" for key, value in named.items())
        raise ValueError(f"{file} has no {'splits' if columns else 'columns and no splits'}: leave {said} out")


def _texts_of(folder: Path) -> list[Path]:
    """The texts of a folder that holds prompts by id, one in each `ID.txt`, as DPG-Bench has them; none of one with pictures."""
    names = [name for _, inside in walk(folder) for name in inside]
    pictured = any(name in METADATA or Path(name).suffix.lower() in IMAGES for name in names)
    return [] if pictured else sorted(folder.glob("[!.]*.txt"))


def _by_id(table: Mapping[str, str], file: Path) -> Captioned:
    """Prompts alone, by id."""
    found = _texts(list(table.values()), file, [{"item_id": name} for name in table])
    return found._replace(names=[(name,) for name in table])


def _texts(cells: Sequence[Any], file: Path, rows: Notes = ()) -> Captioned:
    """Prompts alone, of `rows`."""
    captions = []
    for i, cell in enumerate(cells):
        try:
            captions.append(caption_texts(cell))
        except ValueError as error:
            raise ValueError(f"{file}, row {i} (from 0): the caption is {error}; correct or remove the row") from error
    if not captions:
        raise ValueError(f"{file}: no caption was found")
    return Captioned(captions, notes=_each(captions, rows))


def _each(captions: Sequence[Sequence[str]], rows: Notes) -> list[Notes]:
    """For every caption the row that it is of."""
    return [[row] * len(texts) for texts, row in zip(captions, rows, strict=True)] if rows else []


def _coco(file: Path, data: Any, source: PromptSource, there: bool) -> Captioned:
    pictures = None if source.images is None else place(source.images)
    images = coco(file, data, pictures, by_id=source.captions != "first")
    if there:
        check_there(file, [image.file for image in images], WHERE)
    captions = [[text for row in image.rows for text in _captions(row)] for image in images]
    names = [(str(image.id), image.file.name) for image in images]
    return Captioned(captions, Gallery.of_files([image.file for image in images]), names)


def _grouped(place_: Path, rows: Sequence[Row], source: PromptSource, there: bool, cells: Notes = ()) -> Captioned:
    """Rows by their picture, `cells` being all of each: several rows of one file are several captions of one image."""
    of: dict[str, list[str]] = {}
    notes: dict[str, list[Mapping[str, Any]]] = {}
    for i, row in enumerate(rows):
        try:
            name = file_text(row.file)
        except ValueError as error:
            raise ValueError(f"{row.where}: the image is {error}; correct or remove the row") from error
        texts = _captions(row)
        of.setdefault(name, []).extend(texts)
        notes.setdefault(name, []).extend([cells[i]] * len(texts) if cells else [])
    if not of:
        raise ValueError(f"{place_}: no image with a caption was found")
    files = [Path(name) for name in of]
    if there:
        check_there(place_, files, WHERE)
    if len(of) < len(rows):
        said = f"{place_}: {len(rows) - len(of)} rows name an image again and are further captions of it"
        logging.getLogger(__name__).warning(said)
    names = [(file.name, file.stem) for file in files]
    return Captioned(list(of.values()), Gallery.of_files(files), names, list(notes.values()) if cells else ())


def _captions(row: Row) -> list[str]:
    try:
        return caption_texts(row.caption)
    except ValueError as error:
        raise ValueError(f"{row.where}: the caption is {error}; correct or remove the row") from error


def _data_set(path: str, source: PromptSource) -> Captioned:
    """A data set of Hugging Face, or archives. Raises ValueError for what is none."""
    from ddil_lightning.data.captions import Images

    file, column = place(path), source.caption or "text"
    if file.is_file() and file.suffix.lower() not in (".parquet", ".arrow", ".tar"):
        raise ValueError(f"{shown(file)}: cannot read {file.suffix or 'this'} files; give a folder, a .jsonl, or COCO's captions_*.json")
    if source.image is None:
        cells, cards = load_prompts(path, column, source.split)
        return _texts(cells, file, cards)
    rows = Images(path, image=source.image, caption=column, split=source.split)
    numbers = range(len(rows))
    return Captioned(rows.texts(numbers), Gallery(rows.sources, numbers), [(str(i),) for i in numbers])
