"""A model file to a Segmenter: normalised windows in, probabilities out, on one device.

What the bytes of the output depend on, found by trying (torch 2.13 and OpenVINO 2026.4, x86 with
AVX-512, CPU, float32, U-Nets of several widths, 1 to 4 threads, batches of 1 to 4, windows from
16 pixels on; `tests/test_segmenter.py`, `tests/test_backends.py`):

    =================  ===================================================================  ========
    of                 eager                                                                openvino
    =================  ===================================================================  ========
    batch-mates        no                                                                   no
    slot in the batch  no with channels_last; 1x1 convolutions in contiguous format, for    no
                       odd sizes
    threads            no with channels_last, once 1x1 convolutions go to oneDNN            no
                       (`eager.steady`). Yes where batch is 1 and a layer's input has
                       20,480 values or fewer: tiny windows
    batch size         yes, 1 against more, for the same layers. So a batch is always       no
                       filled
    earlier windows    no                                                                   no
    settings           window, memory format, precision: yes                                window,
                                                                                            precision
    =================  ===================================================================  ========

The two differ by rounding: about 1e-6 in a probability. torch's own sigmoid and softmax on CPU
depend on the slot and on the threads (what is left over of a vector is computed by scalar code),
and numpy's do not, so probabilities are computed by numpy there. What is not among the settings is
in `Segmenter.made_by`.
"""

from segpipe.segmenter.devices import choose_device, device_type, gpu_count, gpu_is_possible
from segpipe.segmenter.segmenter import Segmenter, load_segmenter

__all__ = [
    "Segmenter",
    "choose_device",
    "device_type",
    "gpu_count",
    "gpu_is_possible",
    "load_segmenter",
]
