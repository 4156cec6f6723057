"""Benchmarks whose numbers compare: every rival, the copy bandwidth and the peak of products in one process, in turn.

    clock       how a program is timed, and what the machine can do at most
    products    `qjax bench kernels`: products with packed weights against dense ones
    texts       `qjax bench generate`: tokens a second from decoded and from packed weights

Rows have the columns of the roofline figure: operations, bytes moved, seconds, and the machine's two roofs.
"""
