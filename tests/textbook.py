"""The solvers of the books as one plain loop, to compare with."""

from itertools import pairwise


def textbook(v, x, times, solver):
    """Carry x along v(x, t) through the times, of which the first is its own."""
    last = None
    for t, s in pairwise(times):
        h, middle = s - t, (t + s) / 2
        k1 = v(x, t)
        if solver == "midpoint":
            x = x + h * v(x + h / 2 * k1, middle)
        elif solver == "heun":
            x = x + h / 2 * (k1 + v(x + h * k1, s))
        elif solver == "rk4":
            k2 = v(x + h / 2 * k1, middle)
            k3 = v(x + h / 2 * k2, middle)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + v(x + h * k3, s))
        elif solver == "ab2" and last:
            ratio = h / (2 * last[0])
            x = x + h * ((1 + ratio) * k1 - ratio * last[1])
        else:
            assert solver in ("euler", "ab2"), solver
            x = x + h * k1
        last = h, k1
    return x
