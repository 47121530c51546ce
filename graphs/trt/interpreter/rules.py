"""Every kind of layer that the interpreter knows, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from graphs.trt.interpreter import rules_attention, rules_math, rules_places, rules_plugins, rules_shapes
from graphs.trt.interpreter.rule import Rule, merge_rules

RULES: Mapping[str, Rule] = MappingProxyType(
    merge_rules(rules_shapes.RULES, rules_places.RULES, rules_math.RULES, rules_attention.RULES, rules_plugins.RULES)
)
