"""Token records to batches: how rows are filled. Losses see [B, K, L] whichever layout is used.

padded                 one row per completion: prompt, completion, padding. G = B groups of K rows.
shared_prefix          one row per prompt: the prompt once, then its completions side by side, none seeing another;
                       positions restart after the prompt. G = B groups of one row.
packed                 several sequences (a prompt with one completion) share a row, each a segment of its own.
shared_prefix_packed   several prompts share a row, each with all its completions as in shared_prefix.

The packed layouts fill the rows of each group by first-fit decreasing; the caller gives G, which divides B, so that a
record's rows lie on the device that holds the record. The number of rows is a static size like T and L: one Shape
holds them all.

    shape = plan_shape(records, layout, 8, groups=G, batches=plan.sequence(steps))      # once, of the whole plan
    batch = fill([records[i] for i in index], shape, layout, pad_id=0, groups=G)        # at each step
    tokens, cells = occupancy(batch)                                                    # how full the rows are

Slot (b, k, l) is predicted by the hidden state one token earlier: the last prompt token for l = 0. Masks are
explicit: they cover exactly the completion's tokens, EOS included where it stands, or those of them that the record
marks as scored. Where the prompt is empty and there is no BOS, nothing predicts the first token, so slot 0 is not
scored; such a completion counts one token less.
"""

from alignax.data.layouts.packing import first_fit_decreasing
from alignax.data.layouts.rows import fill, mismatched, occupancy, padded, shared_prefix
from alignax.data.layouts.shapes import LAYOUT_NAMES, Multiple, Shape, bucket, bucket_shape, plan_shape

__all__ = ["LAYOUT_NAMES", "Multiple", "Shape", "bucket", "bucket_shape", "fill", "first_fit_decreasing", "mismatched",
           "occupancy", "padded", "plan_shape", "shared_prefix"]
