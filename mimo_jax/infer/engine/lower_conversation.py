"""The programs of one conversation, lowered from shapes alone, for `analysis.memory_estimate` to compile and measure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.analysis.memory_estimate import LoweredConversation
from mimo_jax.config import Config
from mimo_jax.data import conversation
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.data.transforms import preprocess
from mimo_jax.infer.engine.compiled import cache_sharding, functions
from mimo_jax.infer.engine.decode_batch import bucket, cache_bucket


def lower_conversation(config: Config, params: dict, tokenizer: Tokenizer) -> LoweredConversation:
    """The first turn about one image, with a question of the maximum length that the aligner reads and a cache for the whole context.
    params: nested dict of the shapes of all parameters, with their shardings if there are several devices."""
    m = config.model
    call = functions(config.model_json(), conversation.stop_id(tokenizer, config))
    slots = cache_bucket(m.llm.max_length)
    turn = bucket(min(len(conversation.encode_user_turn(tokenizer, config, "?", 0, True)[0]) + m.aligner.max_text, m.llm.max_length))

    def array(kind, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    views = {name: array(value.dtype, 1, *value.shape) for name, value in preprocess(np.zeros((1, 1, 3), np.uint8), m).items()}
    x_img, features = call.encode.eval_shape(params, views)
    text, prompts = (1, 1, m.aligner.max_text), (1, 1, m.prompt.max_tokens)
    aligned = (x_img, array(jnp.int32, *text), array(bool, *text), array(jnp.float32, *prompts, 2), array(jnp.int32, *prompts))
    x_q = call.align.eval_shape(params, *aligned)
    words = (array(jnp.int32, 1, turn), array(jnp.int32, 1, turn), x_q)
    cache = call.new_cache.eval_shape(params, rows=1, slots=slots)
    if place := cache_sharding(config, params):
        cache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), cache)
    row = array(jnp.int32, 1)
    asked = (cache, call.splice.eval_shape(params, *words), row, row, row)
    chosen = (array(jnp.float32, 1), array(jnp.float32, 1), array(jnp.uint32, 1))
    new = config.generate.max_new_tokens
    state = call.prefill.eval_shape(params, *asked, *chosen, new_tokens=new)._replace(cache=cache)
    programs = {
        "encode the image": call.encode.lower(params, views),
        "align a question": call.align.lower(params, *aligned),
        f"read {turn} tokens": call.prefill.lower(params, *asked, *chosen, new_tokens=new),
        "answer": call.decode.lower(params, state, array(jnp.int32)),
        "segment a structure": call.segment.lower(params, features, state.states, array(jnp.int32, 1, 1), None, refine=False),
    }
    return LoweredConversation(programs, cache, slots, (x_img, features))
