"""Code for a process in which some modules are as if they were not installed."""

HIDE = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in absent else find_spec(name, package)
)
"""
"""Hides the set `absent` from `import` and from who asks first; wants `importlib.util`, `sys`."""
