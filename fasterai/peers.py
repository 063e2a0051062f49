"Where the numbers lie: on the host, on GPUs, later in other processes too. What selection reads and sums goes through here."
import numpy as np
import torch


class Alone:
    "One process: all numbers are here. On a CPU numpy compares and picks many times faster than torch; elsewhere tensors stay where they are."

    def on_host(self, tensor): return tensor.is_cpu

    def array(self,
        values,  # a tensor or an array
    ):  # an array where the values are on the host, else as they came
        if isinstance(values, torch.Tensor) and self.on_host(values): return values.numpy()
        return values

    def fetched(self,
        pieces: list,  # tensors, or arrays
    ) -> list:  # arrays
        "What the host wants to see, brought over in one piece from each device: it waits once, not for each."
        found = [self.array(piece) for piece in pieces]
        for device in {piece.device for piece in found if isinstance(piece, torch.Tensor)}:
            here = [i for i, piece in enumerate(found) if isinstance(piece, torch.Tensor) and piece.device == device]
            joined = torch.cat([found[i] for i in here]).cpu()
            for i, piece in zip(here, joined.split([len(found[i]) for i in here])): found[i] = piece.numpy()
        return found

    def sent(self,
        pieces: list,  # arrays, or tensors that may be there already
        devices: list,  # where each shall be
    ) -> list:  # tensors
        "The way back, in one piece to each device."
        found = [torch.as_tensor(piece) for piece in pieces]
        for device in {device for piece, device in zip(found, devices) if piece.device != device}:
            here = [i for i, piece in enumerate(found) if devices[i] == device != piece.device]
            joined = torch.cat([found[i] for i in here]).to(device)
            for i, piece in zip(here, joined.split([len(found[i]) for i in here])): found[i] = piece
        return found

    def count(self,
        mask,  # bool, tensor or array
    ) -> int:
        "How many are True."
        mask = self.array(mask)
        if isinstance(mask, np.ndarray): return int(np.count_nonzero(mask))
        return int(torch.count_nonzero(mask))

    def total(self,
        number: int,  # of what is here
    ) -> int:  # of all processes
        return number


ALONE = Alone()
