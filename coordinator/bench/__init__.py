"""What a mesh does with its time: `coordctl bench` and `coordctl profile`.

measure             the whole of a benchmark, in turns: mesh, echo, memory
mesh, load          a mesh whose rounds are recorded; streams of random tokens through it
statistics          records of rounds -> costs of a step (pure)
echo, overhead      the same rounds between bare gRPC processes
roofline            the memory's rate, and the part of it that a worker reaches
processes, machine  child processes; what runs here
report              one JSON object, or tables
timeline            records of rounds -> a Chrome trace (pure)
"""
