"""One file that needs no harmony: all that is read is in it, once, and nothing else."""

import ast
import sys

import pytest

from harmony.training import bundle as bundles
from harmony.training.bundle import bundle, find_names


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write(a=..., b=...)``: the modules ``harmony.a`` and ``harmony.b`` of a package that only the bundler sees."""

    def write_modules(**texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        places = {f"harmony.{name}": type("Spec", (), {"origin": tmp_path / f"{name}.py"}) for name in texts}
        monkeypatch.setattr(bundles.importlib.util, "find_spec", places.__getitem__)
        bundles.read_source.cache_clear()

    yield write_modules
    bundles.read_source.cache_clear()


def test_the_file_runs_alone_and_holds_what_is_read(write):
    write(
        a="import math\nfrom harmony.b import half, WIDTH\n\ndef area(r):\n    return half(math.pi)\n",
        b=(
            "import json\nHEIGHT, WIDTH = 1, 2  # of a page\n\n"
            "def share(n, HEIGHT=3):\n    return n / WIDTH + HEIGHT * 0\n"
            "\ndef half(n):\n    return share(n)\n\ndef other():\n    return json\n"
        ),
    )
    text, names = bundle("harmony.a", "area", "Areas."), {}
    exec(text, names)
    assert round(names["area"](1), 3) == 1.571 and names["HEIGHT"] == 1
    assert text.startswith('"""Areas."""\n\n\nimport math\n') and text.count("# of a page") == 1
    assert "json" not in text and "harmony" not in text and "other" not in text


def test_a_name_with_two_meanings_is_refused(write):
    write(
        a="from harmony.b import f\n\ndef g():\n    return 1\n\ndef main():\n    return f() + g()\n",
        b="def g():\n    return 2\n\ndef f():\n    return g()\n",
    )
    with pytest.raises(ValueError, match=r"g means harmony\.[ab]\.g and harmony\.[ab]\.g"):
        bundle("harmony.a", "main", "x")


@pytest.mark.parametrize("text, body", [("import os.path\n", "os"), ("if True:\n    NO = 1\n", "NO"), ("", "NO")])
def test_what_cannot_be_followed_is_refused(write, text, body):
    """Guards exports against a name that nothing in the file defines: an error here, not in a stranger's program."""
    write(a=f"{text}\ndef f():\n    return {body}\n")
    with pytest.raises(ValueError, match=f"harmony.a reads {body[:2]}, which it neither imports nor defines"):
        bundle("harmony.a", "f", "x")


def test_a_constant_with_its_type_is_followed(write):
    write(a="N: int = 3\n\ndef f():\n    def g():\n        import json\n        return json\n    return N\n")
    names = {}
    exec(bundle("harmony.a", "f", "x"), names)
    assert names["f"]() == 3


def test_names_that_are_the_functions_own_are_not_read():
    code = "def f(a: Kind, b=START) -> Result:\n    c = a\n    return [outer(d, c, b) for d in lines]\n"
    assert find_names(ast.parse(code).body[0]) == {"Kind", "START", "Result", "outer", "lines"}
    assert find_names(ast.parse("lambda a: a + b").body[0]) == {"b"}


def test_the_pipeline_imports_what_is_installed_with_diffusers():
    text = bundle("harmony.training.pipeline", "HarmonyPipeline", "x")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {name.split(".")[0] for n in nodes for name in ([n.module] if hasattr(n, "module") else [n.names[0].name])}
    known = {"PIL", "cv2", "diffusers", "huggingface_hub", "numpy", "torch", "transformers"}
    assert known <= roots <= known | sys.stdlib_module_names
    assert max(map(len, text.splitlines())) <= 120
