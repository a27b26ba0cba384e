"""What is read from the text of an optimized module."""

from octavo.engine.ahead.hlo import Module

TEXT = """\
HloModule jit_forward, is_scheduled=true

%fused_computation.1 (param_0: bf16[4,8,128]) -> bf16[8,128] {
  %copy.9 = bf16[4,8,128]{2,1,0} copy(%param_0)
  ROOT %dynamic-slice.1 = bf16[1,8,128]{2,1,0} dynamic-slice(%copy.9)
}

%body.2 (arg: (s32[], bf16[4,8,128])) -> (s32[], bf16[4,8,128]) {
  %weights = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %fusion.3 = bf16[8,128]{1,0} fusion(%weights), kind=kLoop, calls=%fused_computation.1, \
backend_config={"estimated_cycles":"100"}
  %tpu_decode.7 = bf16[8,128]{1,0} custom-call(%fusion.3), custom_call_target="tpu_custom_call"
  %all-reduce.1 = bf16[8,128]{1,0} all-reduce(%tpu_decode.7), to_apply=%add
  %all-reduce-start.2 = bf16[8,128]{1,0} all-reduce-start(%all-reduce.1), to_apply=%add
  %all-reduce-done.2 = bf16[8,128]{1,0} all-reduce-done(%all-reduce-start.2)
  ROOT %tuple.1 = (s32[], bf16[4,8,128]) tuple(%weights)
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %add.1 = bf16[] add(%a, %b)
}

ENTRY %main.4 (p0: bf16[4,8,128], p1: s32[]) -> bf16[4,8,128] {
  %p0 = bf16[4,8,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %copy.1 = bf16[4,8,128]{2,1,0} copy(%p0), backend_config={"estimated_cycles":"7"}
  %copy.2 = bf16[4,8,128]{2,1,0:S(1)} copy(%p0)
  %constant_dynamic-slice_fusion.4 = bf16[1,8,128]{2,1,0} fusion(%p0), kind=kLoop, calls=%x
  %endless = bf16[8,128] copy(%p0), backend_config={"estimated_cycles":"9223372036854775807"}
  %while.5 = (s32[], bf16[4,8,128]) while(%tuple.0), condition=%cond, body=%body.2
  %all-gather.1 = bf16[4,8,128]{2,1,0} all-gather(%p0), dimensions={0}
  ROOT %out = bf16[4,8,128] get-tuple-element(%while.5), index=1
}
"""


def test_copies_in_memory_are_found_and_those_inside_of_fusions_are_not() -> None:
    module = Module.read(TEXT)
    assert module.copies(4096) == {"bf16[4,8,128]": 1}, "VMEM and fusions are no memory"
    assert module.copies(2048) == {"bf16[4,8,128]": 1, "bf16[1,8,128]": 1, "bf16[8,128]": 1}


def test_the_loop_over_layers_is_the_one_with_our_kernel() -> None:
    module = Module.read(TEXT)
    assert (module.arguments, module.layer_loop()) == (2, "body.2")
    assert module.kernels() == {"tpu_decode": 1}
    assert module.collectives(module.layer_loop()) == {"all-reduce": 2}
    assert module.collectives(module.entry) == {"all-gather": 1, "all-reduce": 2}


def test_cycles_of_a_layer_count_once_a_layer() -> None:
    assert Module.read(TEXT).cycles(32) == 7 + 32 * 100
