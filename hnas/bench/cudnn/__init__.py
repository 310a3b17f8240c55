"""How cuDNN rounds and how fast it is in our networks, where a GPU is but no Paddle for it.

    python -m hnas.bench.cudnn.expected FILE.npz                           with Paddle, on a CPU
    python -m hnas.bench.cudnn --expected FILE.npz --output FILE.json      with PyTorch, on a GPU

Stage three's operators and both stages' training steps, written once more in PyTorch: by Paddle
they are the same library's kernels, chosen by Paddle. In float64 they check Paddle's results by
code that shares nothing with them but the drawn weights.
"""
