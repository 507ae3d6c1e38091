"""The calculator: the one tool that a chat model may call between <|python_start|> and <|python_end|>.

A model writes whatever it likes there, so nothing is ever executed: the text is parsed to an abstract syntax tree and
only these nodes are given a value: numbers, + - * /, parentheses, unary minus and plus, and "text".count("part").
Arithmetic is exact (fractions), so 0.1+0.2 is 0.3. Work is bounded by the caps below before anything is computed:
there is no time-out, hence no signal, hence any thread may calculate.
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

MAX_LENGTH = 256  # characters of an expression
MAX_DEPTH = 32  # nested parentheses, and levels of the syntax tree
MAX_DIGITS = 15  # digits of one number: what a float literal carries exactly
MAX_RESULT = Fraction(10**15)  # results at or above are refused, as are results nearer to zero than its inverse
SIGNIFICANT_DIGITS = 10  # of a result that is not a whole number

_LITERAL = r"""(?:"[^"\\\r\n]*"|'[^'\\\r\n]*')"""
_COUNT = re.compile(rf"{_LITERAL} *\. *count *\( *{_LITERAL} *\)")
_ARITHMETIC = re.compile(r"[0-9.+\-*/() ]+")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> str | None:
    """The value of `expression` as text, or None for anything that is not plain arithmetic within the caps.

    Whole results have no decimal point (10/2 is 5), others at most ten significant digits and never an exponent.
    Commas that group thousands are dropped (1,000*2), as GSM8K writes them.
    """
    if len(expression) > MAX_LENGTH:
        return None
    expression = expression.strip(" ")
    skeleton = _COUNT.sub("0", expression)  # what is left once every "text".count("part") has become a number
    if skeleton == expression:
        expression = skeleton = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), expression)
    if not _ARITHMETIC.fullmatch(skeleton) or not _within_caps(skeleton):
        return None
    try:
        value = _value(ast.parse(expression, mode="eval").body, MAX_DEPTH)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return _format(value)


def _within_caps(skeleton: str) -> bool:
    depth = deepest = 0
    for character in skeleton:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    longest = max((sum(map(str.isdigit, number)) for number in re.findall(r"[\d.]+", skeleton)), default=0)
    return deepest <= MAX_DEPTH and longest <= MAX_DIGITS


def _value(node: ast.expr, depth: int) -> Fraction:
    """The value of one node; ValueError for a node the calculator does not know."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(repr(number))  # through the decimal digits: 0.1 is a tenth, not its nearest double
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth - 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, depth - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, depth - 1), _value(right, depth - 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return Fraction(text.count(part))
    raise ValueError("not arithmetic")


def _format(value: Fraction) -> str | None:
    if abs(value) >= MAX_RESULT or 0 < abs(value) < 1 / MAX_RESULT:
        return None
    if value.denominator == 1:
        return str(value.numerator)
    context = Context(prec=SIGNIFICANT_DIGITS, rounding=ROUND_HALF_EVEN)
    rounded = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
