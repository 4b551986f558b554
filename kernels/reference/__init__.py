"""The specification that runs: every op in scalar order, in numpy fp32. Slow, independent of the compiled code.

bf16 values travel as fp32 arrays whose lower 16 bits are zero; ``arith.bf16`` rounds to them.
"""
