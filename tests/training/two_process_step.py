"""A tiny decoder and AdamW for the sharding tests; run as a script, one of several processes that train it together."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qjax import processes
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.training.run import sharding
from qjax.training.run.data import Batches, open_tokens

CONFIG = DecoderConfig(vocab=64, dim=32, hidden=64, layers=2, heads=4, kv_heads=4, head_dim=8, context=16)
MODEL = Decoder(CONFIG)
OPTIMIZER = optax.adamw(1e-3, weight_decay=0.1, eps=1e-6)


def fresh_state():
    weights = MODEL.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return {"weights": weights, "optimizer": OPTIMIZER.init(weights), "step": jnp.int32(0)}


def train_step(state, batch):
    def loss_of(weights):
        logits = MODEL.apply({"params": weights}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_of)(state["weights"])
    updates, optimizer = OPTIMIZER.update(grads, state["optimizer"], state["weights"])
    weights = optax.apply_updates(state["weights"], updates)
    return {"weights": weights, "optimizer": optimizer, "step": state["step"] + 1}, loss


def train_sharded(windows, mesh, steps, process=0, processes=1):
    """The state after `steps` on a mesh, and the losses."""
    # small=0: even the smallest matrix is cut, or the test would fail here.
    where = sharding.shardings(jax.eval_shape(fresh_state), mesh, small=0)
    state = sharding.distribute(jax.jit(fresh_state)(), where)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(where, None))
    losses = []
    for s in range(steps):
        batch = sharding.global_batch(windows.batch_at(s, process, processes), mesh)
        state, loss = step(state, batch)
        losses.append(float(loss))
    return state, losses


def train_alone(windows, steps):
    """The same without a mesh, by plain JAX on one device."""
    state, losses = jax.jit(fresh_state)(), []
    step = jax.jit(train_step)
    for s in range(steps):
        state, loss = step(state, windows.batch_at(s))
        losses.append(float(loss))
    return state, losses


def main():
    parser = argparse.ArgumentParser()
    for name, kind in (("coordinator", str), ("processes", int), ("process", int), ("steps", int), ("batch", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("tokens")
    parser.add_argument("out")
    args = parser.parse_args()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    processes.start_processes(args.coordinator, args.processes, args.process)
    assert jax.process_count() == args.processes and jax.process_index() == args.process

    mesh = sharding.mesh(data=2, fsdp=-1)
    windows = Batches(open_tokens(args.tokens), CONFIG.context, args.batch)
    state, losses = train_sharded(windows, mesh, args.steps, args.process, args.processes)
    kernel = state["weights"]["layers_0"]["attn"]["q"]["kernel"]
    assert len(kernel.addressable_shards) == jax.local_device_count() < len(jax.devices())
    assert not kernel.is_fully_addressable and kernel.addressable_shards[0].data.shape == (32, 32 // mesh.shape["fsdp"])
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    whole = [np.asarray(leaf) for leaf in jax.tree.leaves(gather(state["weights"]))]
    np.savez(args.out, losses=np.array(losses), **{str(i): leaf for i, leaf in enumerate(whole)})


if __name__ == "__main__":
    main()
