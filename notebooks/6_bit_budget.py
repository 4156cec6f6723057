# %% [markdown]
# # A budget of bits
#
# Not every weight needs as many bits. We measure what each format costs at each group of weights, choose the formats
# that cost least in as many bytes as llama-quantize's Q4_0 takes, and look whether the whole keeps what its parts
# promised.

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML

import qjax
from qjax.budget import plan_for, size_of_mix
from qjax.models import stdlib_text
from qjax.tables import html_table

# %% [markdown]
# The model that comes with qjax, and eight windows of text: half to measure on, half to check plans on.

# %%
model = qjax.load("reference")
text = model.tokenizer.encode(stdlib_text.calibration_text(20_000, 0))
tokens = np.asarray(text[: 8 * 64], np.int32).reshape(8, 64)
plan, found = plan_for(model, tokens, like="Q4_0", formats=("Q4_0", "IQ4_NL", "Q5_0", "Q8_0"), recipe="rtn", measured=1)
plan

# %% [markdown]
# KL with one group alone rounded to Q4_0. **A byte of the dearest group costs more than thirty times as much as one of
# the cheapest.**

# %%
dear = {s.group.name: s.choices[0] for s in found.sensitivities}
density = {name: c.cost / c.nbytes for name, c in dear.items()}
assert max(density.values()) > 30 * min(density.values())
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.bar(range(len(dear)), [c.cost for c in dear.values()])
axes.set(yscale="log", ylabel="KL, nats", xlabel="group of weights, from the embedding to the last layer")
plt.show()

# %% [markdown]
# All plans that were run as a whole. **The sum of the parts is right within a third, and the plan is better than the
# uniform formats and mixes that are no larger**, on windows that nothing was chosen by.

# %%
budget, *_ = found.candidates
assert budget.predicted is not None and abs(budget.predicted / budget.kl - 1) < 1 / 3
assert found.best.kl < min(c.kl for c in found.candidates if not c.name.startswith("budget"))
rows = [(c.name, f"{c.nbytes:,}", f"{c.predicted:.5f}", f"{c.kl:.5f} ± {c.kl_se:.5f}") for c in found.candidates]
HTML(html_table("Plans", ("plan", "bytes", "sum of parts", "KL, nats"), rows, (1, 2, 3)))

# %% [markdown]
# It is an ordinary plan: `plan.to_toml()` is a file for `qjax quantize --plan`, and any recipe rounds it.

# %%
qparams, report = qjax.quantize_params(model.params, plan)
assert 0.99 * size_of_mix(model, "Q4_0") < report.nbytes <= size_of_mix(model, "Q4_0")
report
