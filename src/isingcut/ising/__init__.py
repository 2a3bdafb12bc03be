"""The Ising model of block removal and its solvers; torch never enters.

`hamiltonian` h, J, c, energies of states; `constraints` linear rows with reasons; `problem` both
together, and which rows clash; `solvers/` problem -> states; `spectrum` ranked distinct states.
"""
