"""The Ising model of block removal and its solvers; nothing here imports torch.

`hamiltonian`: h, J, c and energies of states; `constraints`: linear rows with reasons; `problem`:
both together, and detection of conflicting rows; `solvers/`: find states of a problem; `spectrum`:
ranked distinct states.
"""
