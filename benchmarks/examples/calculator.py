"""A calculator for the model: wherever it writes `<<3*4=`, the result and `>>` are put in.

The answers of GSM8K are written so. The model reads the result and has no gradient from it, since
`env_mask` is 0 there. In a configuration: `rollout_fn: benchmarks/examples/calculator.py:rollout`
"""

import ast
import operator
import re

MAX_CALLS = 8  # of a completion: each is a turn, which reads the completion from its start
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str:
    """Return the value of an expression of numbers, + - * / and brackets, or `error`."""

    def value(node):
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.UnaryOp(op=op, operand=operand):
                return OPERATORS[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError(expression)

    try:
        return f"{value(ast.parse(expression.strip(), mode='eval').body):.12g}"
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def rollout(prompts, engine):
    """Let the model write until it calls, put the result in, and let it go on."""
    tokenizer, room = engine.tokenizer, engine.sampling.max_completion_length
    equals = {i for token, i in tokenizer.get_vocab().items() if token.endswith("=")}
    prompt_ids = [engine.encode(prompt) for prompt in prompts]
    completion_ids, logprobs, env_mask = ([[] for _ in prompts] for _ in range(3))
    calls = [0] * len(prompts)

    def append(i, ids, logps, own):
        completion_ids[i] += ids
        logprobs[i] += logps
        env_mask[i] += [own] * len(ids)

    going_on = list(range(len(prompts)))
    for turn in range(MAX_CALLS + 1):
        drawn = engine.generate(
            [prompt_ids[i] + completion_ids[i] for i in going_on],
            max_completion_length=[room - len(completion_ids[i]) for i in going_on],
            stop_token_ids=equals if turn < MAX_CALLS else (),
        )
        called = []
        for i, one in zip(going_on, drawn, strict=True):
            append(i, one.completion_ids, one.logps.tolist(), 1)
            if one.completion_ids[-1] not in equals:
                continue
            call = re.search(r"<<([^<>=]*)=$", tokenizer.decode(completion_ids[i]))
            result = f"{calculate(call[1])}>>" if call else ""
            ids = tokenizer(result, add_special_tokens=False)["input_ids"]
            if len(completion_ids[i]) + len(ids) < room:
                append(i, ids, [0.0] * len(ids), 0)
                calls[i] += bool(call)
                called.append(i)
        going_on = called
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": logprobs,
        "env_mask": env_mask,
        "calls": calls,  # a column for the reward functions and the log
    }
