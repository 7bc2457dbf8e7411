"""What a machine can check of layout and style, without any package. Prints every violation; exit code 1 if there is one."""
import ast
import subprocess
import sys
from pathlib import Path

MODELS = ("var", "llamagen", "infinity", "latentsync", "syncnet")
LEVEL = {"triton_ops": 0, "vq": 1, **dict.fromkeys(MODELS, 2), "lib": 3, "sample": 4, "train": 4}
MODEL_PACKAGES = {"torch", "numpy", "einops", "safetensors", "triton"}      # all that a lifted model file may import
violations = []


def modules_of(node):
    """First parts of the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module.split(".")[0]]
    return []


def check_imports(path, tree):
    """Imports point downwards: train, sample -> lib -> models -> vq -> triton_ops; models import no other package."""
    own = "lib" if path.parent.name == "lib" else path.stem
    if own not in LEVEL:
        violations.append(f"{path}: not in the layout")
        return
    for node in ast.walk(tree):
        for name in modules_of(node):
            inside_lib = own == name == "lib"
            if name in LEVEL and LEVEL[name] >= LEVEL[own] and not inside_lib:
                violations.append(f"{path}:{node.lineno} imports {name}: imports only point downwards")
            stdlib = name in sys.stdlib_module_names
            if LEVEL[own] < 3 and name not in LEVEL and not stdlib and name not in MODEL_PACKAGES:
                violations.append(f"{path}:{node.lineno} imports {name}: a lifted model file would need it")


def check_circles(trees):
    """Inside lib/ no file imports itself through others."""
    graph = {}
    for path, tree in trees.items():
        if path.parent.name == "lib":
            names = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module == "lib":
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lib."):
                    names.add(node.module.split(".")[1])
            graph[path.stem] = names

    def visit(name, way):
        if name in way:
            violations.append(f"lib/: {' -> '.join([*way, name])} is a circle")
        else:
            for other in graph.get(name, ()):
                visit(other, [*way, name])
    for name in graph:
        if not any("is a circle" in line for line in violations):
            visit(name, [])


def check_style(path, tree, text):
    """Docstrings on public names, at most 120 columns, nothing that a model file must not do."""
    if not ast.get_docstring(tree):
        violations.append(f"{path}: no docstring")
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node) and path.parts[0] != "tests":
            violations.append(f"{path}:{node.lineno} {node.name}: no docstring")
    for i, line in enumerate(text.splitlines(), 1):
        if len(line) > 120:
            violations.append(f"{path}:{i}: {len(line)} columns")
    forbidden = [".cuda()", "weights_only=False", "strict=False"]
    if path.stem in (*MODELS, "vq", "triton_ops"):
        forbidden += [" print(", "argparse.ArgumentParser", "torch.manual_seed"]
    if path.parts[0] not in ("tests", ".ci"):
        violations.extend(f"{path}: {word}" for word in forbidden if word in text)


def check_help():
    """--help answers with nothing installed: -S hides all packages."""
    commands = {"sample.py": ("var", "infinity", "llamagen", "latentsync", "syncnet", "vq", "ops"),
                "train.py": ("vq", "var", "infinity", "llamagen", "syncnet", "whisper", "videomae", "latentsync")}
    for script, models in commands.items():
        for argv in ([script, "--help"], *([script, model, "--help"] for model in models)):
            result = subprocess.run([sys.executable, "-S", *argv], capture_output=True, text=True)
            if result.returncode or len(result.stdout) < 200:
                violations.append(f"{argv} needs a package to answer: {result.stderr[-200:]}")


def check_files():
    """The README names all files, and nothing in the repository is too large."""
    readme = Path("README.md").read_text()
    lib_readme = Path("lib/README.md").read_text()
    for path in Path(".").glob("*.py"):
        if f"`{path}`" not in readme:
            violations.append(f"README.md: the file map lacks {path}")
    for path in Path("lib").glob("*.py"):
        if path.name != "__init__.py" and f"`{path.name}`" not in lib_readme:
            violations.append(f"lib/README.md: the file map lacks {path.name}")
    for path in [*Path("demo").rglob("*"), *Path("tests/parity").iterdir()]:
        if path.stat().st_size > 6e6:
            violations.append(f"{path}: larger than 6 MB")


def main():
    trees = {}
    for path in sorted([*Path(".").glob("*.py"), *Path("lib").glob("*.py"), *Path("tests").glob("*.py")]):
        text = path.read_text()
        trees[path] = ast.parse(text)
        check_style(path, trees[path], text)
        if path.parts[0] != "tests":
            check_imports(path, trees[path])
    check_circles(trees)
    check_help()
    check_files()
    print("\n".join(violations) or "layout, imports, style, help and file maps are in order")
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
