"""The Ising model of block removal and its solvers, without torch.

`hamiltonian`: h, J, c and energies of states; `constraints`: linear rows with reasons; `problem`:
both together, and which rows conflict; `solvers/`: find states of a problem; `spectrum`: ranked
distinct states.
"""
