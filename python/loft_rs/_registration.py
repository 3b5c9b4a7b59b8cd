"""Makes PEFT know LOFT: adds the enum member and calls PEFT's own `register_peft_method`, once,
whenever peft is imported.

`import loft_rs` must stay light, so it never imports peft. If peft is already there, LOFT is
registered at once; otherwise a `sys.meta_path` finder lets the ordinary machinery import peft,
registers LOFT right after peft's own code has run, and goes.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import threading
from typing import Any

__all__ = ["register", "register_when_imported"]


def register() -> None:
    """Register LOFT with the imported peft; does nothing where LOFT is already there, also one that
    PEFT itself ships.
    """
    from peft.utils import PeftType, register_peft_method

    tuner = importlib.import_module(f"{__package__}.tuner")
    if "LOFT" in PeftType.__members__ or not hasattr(
        tuner, "LoftModel"
    ):  # a tuner half imported registers at its own end
        return
    member: Any = str.__new__(PeftType, "LOFT")
    member._name_ = member._value_ = "LOFT"
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append("LOFT")
    PeftType._member_map_["LOFT"] = member
    PeftType._value2member_map_["LOFT"] = member
    type.__setattr__(PeftType, "LOFT", member)
    register_peft_method(
        name="loft", config_cls=tuner.LoftConfig, model_cls=tuner.LoftModel, prefix=tuner.LoftModel.prefix
    )


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Finds `peft` through the other finders and wraps its loader. Stays until peft has run: many
    only ask whether it is there.
    """

    def __init__(self):
        self._asking = threading.local()

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "peft" or getattr(self._asking, "others", False):
            return None
        self._asking.others = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self._asking.others = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader alone
        return spec


def register_when_imported() -> None:
    """Register now if peft is imported (fully), else right after it is."""
    if hasattr(sys.modules.get("peft"), "get_peft_model"):
        register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())
