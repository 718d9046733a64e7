"""Whatever stands in a file of texts: what its reader promises, or one line that names it."""

import itertools
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import UserError, class_labels
from plumbing.data import check_text, load_dataset, load_prompts

# Texts as UTF-8 holds them, and texts with halves of surrogate pairs, which it does not.
TEXTS = st.text(max_size=20)
ANY_TEXTS = st.text(st.characters(exclude_categories=()), max_size=20) | st.just("\ud800") | TEXTS
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXTS,
                    lambda values: st.lists(values, max_size=3) | st.dictionaries(ANY_TEXTS, values,
                                                                                  max_size=3), max_leaves=5)
KEYS = st.sampled_from(["prompt", "caption", "text", "file_name", "other"])
LINES = st.dictionaries(KEYS, ANY_TEXTS | JSON, min_size=1).map(json.dumps)
# Files of any bytes, and files of lines that may be right.
FILES = st.binary(max_size=60) | (st.lists(LINES, max_size=2) | st.lists(LINES | ANY_TEXTS, max_size=4)).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
# A text with signs that a reader could take for a line's end.
ODD = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\rh"
DEEP = "[" * 100_000
NOT_UTF_8 = os.fsdecode(b"caf\xe9")

quick = settings(deadline=None, derandomize=True, max_examples=150, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A new folder for each call."""
    base, numbers = tmp_path_factory.mktemp("readers"), itertools.count()

    def new():
        (path := base / str(next(numbers))).mkdir()
        return path
    return new


def pictures(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (50 * i, 0, 0)).save(folder / name)
    return str(folder)


def result_or_line(read, name):
    """What read() returns, or None after a UserError of one line that holds the name."""
    try:
        return read()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(name) in str(error)


def is_text(text):
    return isinstance(text, str) and text.encode() is not None


# Single texts

@quick
@given(JSON)
def test_a_text_is_what_utf_8_can_hold(value):
    try:
        good = isinstance(value, str) and bool(value.encode() + b" ")
    except UnicodeEncodeError:
        good = False
    if good:
        assert check_text(value) is value
    else:
        with pytest.raises(ValueError):
            check_text(value)


# Files of prompts

@quick
@given(FILES, st.sampled_from(["txt", "jsonl"]))
def test_any_file_of_prompts(folder, content, suffix):
    file = folder() / f"p.{suffix}"
    file.write_bytes(content)
    prompts = result_or_line(lambda: load_prompts(file), f"--prompts {file}: ")
    assert prompts is None or prompts and all(is_text(prompt) and prompt.strip() for prompt in prompts)


@quick
@given(st.lists(TEXTS, max_size=5), st.booleans(), st.booleans())
def test_prompts_as_json_lines_come_back(folder, texts, escaped, marked):
    """Each as it was, without the blank ones; with a byte order mark or without."""
    file, texts = folder() / "p.jsonl", [*texts, ODD]
    names = itertools.cycle(["prompt", "caption", "text"])
    lines = [json.dumps({name: text}, ensure_ascii=escaped) for name, text in zip(names, texts)]
    file.write_text("\n".join(lines), encoding="utf-8-sig" if marked else "utf-8", newline="\r\n")
    assert load_prompts(file) == [text for text in texts if text.strip()]


@quick
@given(st.lists(TEXTS.map(lambda text: text.replace("\n", " ")), max_size=5), st.booleans())
def test_prompts_as_lines_come_back(folder, texts, marked):
    file, texts = folder() / "p.txt", [ODD, *texts]
    file.write_text("\n".join(texts), encoding="utf-8-sig" if marked else "utf-8", newline="")
    assert load_prompts(file) == [text.strip() for text in texts if text.strip()]


@pytest.mark.parametrize("line", [
    *(f'{{"prompt": {value}}}' for value in ("null", "5", '["a"]', '{"a": "b"}', r'"\ud800"', "9" * 5000)),
    '"a"', "null", "5", '["prompt"]', '{"prompt": "a', "{}", DEEP], ids=lambda line: line[:25])
def test_a_line_that_holds_no_prompt_is_named(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"^--prompts \S*p\.jsonl: line 3 must be a JSON object with prompt"):
        load_prompts(file)


def test_the_first_text_of_a_row_is_its_prompt(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": null, "text": "b", "caption": "a"}\n{"text": "c"}\n{"prompt": " "}\n')
    assert load_prompts(file) == ["a", "c"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_line_of_another_encoding_is_named(tmp_path, suffix):
    file = tmp_path / f"p.{suffix}"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8; save the file as UTF-8"):
        load_prompts(file)


def test_a_file_of_prompts_that_is_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); give"):
        load_prompts(tmp_path)


# metadata.jsonl

@quick
@given(FILES)
def test_any_metadata(folder, content):
    path = folder()
    pictures(path, "a.png")
    good = b'{"file_name": "a.png", "text": "good"}\n'
    (path / "metadata.jsonl").write_bytes(good + content)
    dataset = result_or_line(lambda: load_dataset(str(path), 4), f"--dataset {path}/metadata.jsonl: line ")
    if dataset:
        captions = dataset.all_captions()
        assert "good" in captions and all(map(is_text, captions)) and dataset.state()
        assert [dataset[i]["caption"] for i in range(len(dataset))].count("good") >= 1


@quick
@given(st.lists(TEXTS, max_size=5), st.booleans(), st.booleans())
def test_captions_in_metadata_come_back(folder, texts, escaped, marked):
    path, texts = folder(), [*texts, ODD]
    pictures(path, "a.png")
    lines = [json.dumps(dict(file_name="a.png", text=text), ensure_ascii=escaped) for text in texts]
    (path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig" if marked else "utf-8")
    dataset = load_dataset(str(path), 4)
    assert [dataset[i]["caption"] for i in range(len(dataset))] == texts
    assert dataset.all_captions() == sorted(set(texts))


@pytest.mark.parametrize("row", [
    '{"text": "a"}', '{"file_name": null}', '{"file_name": 5}', '{"file_name": ["a"]}', '{"file_name": {}}',
    *(f'{{"file_name": "a.png", "text": {value}}}' for value in ("null", "5", '["a"]', "{}", r'"\ud800"')),
    "null", "[]", '"file_name"', "{", DEEP], ids=lambda row: row[:40])
def test_a_row_of_metadata_that_cannot_be_right_is_named(tmp_path, row):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n\n' + row)
    with pytest.raises(UserError, match=r"^--dataset \S*/metadata\.jsonl: line 3 must be .*file_name"):
        load_dataset(str(tmp_path), 4)


def test_a_row_without_a_text_and_files_that_are_not_there(tmp_path):
    """No text is the empty one; absent files are skipped, and the state of the others can be had."""
    outside = pictures(tmp_path, "out.png", "in/a.png")
    names = ["../out.png", f"{outside}/in/a.png", "absent.png", "\0", "x" * 300, "\ud800"]
    rows = "\n".join(json.dumps(dict(file_name=name)) for name in names)
    (tmp_path / "in" / "metadata.jsonl").write_text(rows)
    dataset = load_dataset(str(tmp_path / "in"), 4)
    assert [dataset[i]["image"][0, 0, 0].item() for i in range(6)] == [0, 50, 0, 0, 0, 0]
    assert dataset.all_captions() == [""] and len(dataset[2]["skipped"]) == 4
    assert dataset[2]["skipped"][0] == f"{tmp_path}/in/absent.png (No such file or directory)"
    before = dataset.state()
    pictures(tmp_path / "in", "absent.png")
    assert len(dataset.state()) == len(before) + 1


# Captions beside the pictures, and folders' names

@quick
@given(st.binary(max_size=30) | TEXTS.map(str.encode) | TEXTS.map(lambda text: text.encode("utf-8-sig")))
def test_any_caption_beside_a_picture(folder, content):
    """It is read, or its picture is skipped with the reason."""
    path = folder()
    pictures(path, "0.png", "1.png")
    (path / "0.txt").write_bytes(content)
    (path / "1.txt").write_text("good")
    dataset = load_dataset(str(path), 4)
    sample, captions = dataset[0], result_or_line(dataset.all_captions, f"{path}/0.txt: not UTF-8; save it")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").strip()
    except UnicodeDecodeError:
        assert sample["skipped"] == [f"{path}/0.png ({path}/0.txt: not UTF-8)"] and captions is None
        assert sample["caption"] == "good" and sample["image"][0, 0, 0] == 50
    else:
        assert sample["caption"] == text and sample["skipped"] == [] and sample["image"][0, 0, 0] == 0
        assert captions == sorted({text, "good"})


def test_a_caption_that_is_a_folder(tmp_path):
    pictures(tmp_path, "0.png", "1.png")
    (tmp_path / "0.txt").mkdir()
    dataset = load_dataset(str(tmp_path), 4)
    assert dataset[0]["skipped"] == [f"{tmp_path}/0.png ({tmp_path}/0.txt: Is a directory)"]
    with pytest.raises(UserError, match=r"--dataset \S*: the caption \S*/0\.txt: Is a directory; save"):
        dataset.all_captions()


def test_folders_and_files_whose_names_are_not_utf_8(tmp_path):
    """A file's may be; a folder's becomes a caption, unless its pictures have some."""
    pictures(tmp_path, f"good/{NOT_UTF_8}.png")
    assert load_dataset(str(tmp_path), 4).all_captions() == ["good"]
    pictures(tmp_path, f"{NOT_UTF_8}/0.png")
    with pytest.raises(UserError, match=r"^--dataset \S*: the name of .* 'caf.udce9' is not UTF-8"):
        load_dataset(str(tmp_path), 4)
    (tmp_path / NOT_UTF_8 / "0.txt").write_text("coffee")
    assert load_dataset(str(tmp_path), 4).all_captions() == ["", "coffee"]


# Names of classes

OWL = "great grey owl, Strix nebulosa"
NAMES = st.text(st.characters(max_codepoint=0x250), min_size=1, max_size=8) | st.sampled_from(
    ["dog", "hot dog", "t-shirt", "C", "C++", "C#", "+", OWL, "हिन्दी", "हन"])


@quick
@given(st.lists(NAMES.filter(str.strip), min_size=1, max_size=5), st.data())
def test_a_prompt_finds_the_class_that_it_names(names, data):
    """Between words and marks, in whatever case; a longer name that stands there goes first."""
    name = data.draw(st.sampled_from(names))
    for prompt in (f"a photo of a {name}", f'"{name}", on white', f"({name.upper()})."):
        if name.lower() in prompt.lower():  # for some letters there is no way back from their upper case
            found = names[class_labels([prompt], names)]
            assert found == name or len(found) >= len(name)
            assert {*"".join(found.lower().split())} <= {*prompt.lower()}


@quick
@given(st.lists(ANY_TEXTS, max_size=3), st.lists(ANY_TEXTS, min_size=1, max_size=3))
def test_any_prompts_and_classes(prompts, names):
    labels = result_or_line(lambda: class_labels(prompts, names), "names no class")
    assert labels is None or len(labels) == len(prompts) and all(0 <= label < len(names) for label in labels)


@pytest.mark.parametrize("prompt, name", [
    ("a photo of a dog.", "dog"), ("a photo of a hot dog!", "hot dog"), ("a Dog, a bone", "dog"),
    ("a big dog", "big dog"), ("a red t-shirt.", "t-shirt"), (f"a {OWL}.", OWL), (f"{OWL.upper()}!", OWL),
    ("a C++ book", "C++"), ("a c", "C"), ("a C#.", "C#"), ("two + two", "+"), ("a photo of a हन", "हन")])
def test_marks_part_words_and_tell_names_apart(prompt, name):
    names = ["C", "C#", "C++", "+", "big dog", "dog", "hot dog", "t-shirt", OWL, "हिन्दी", "हन"]
    assert names[class_labels([prompt], names)] == name


@pytest.mark.parametrize("prompt", ["catalogue", "", "!", "a cat_2"])
def test_a_prompt_that_names_no_class(prompt):
    with pytest.raises(UserError, match="names no class of the model; its classes are cat, dog$"):
        class_labels([prompt], ["cat", "dog"])
