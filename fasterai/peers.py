"Read and sum numbers wherever they lie: on the host, on GPUs, and later in other processes."
import numpy as np
import torch


class Alone:
    """Read and sum the numbers of one process.

    On a CPU numpy compares and picks many times faster than torch; on a GPU tensors stay where they are,
    and what the host must see comes over in one piece. A class with the same methods can do so for several
    processes."""

    def on_host(self, tensor) -> bool:
        "Tell whether the CPU can read a tensor at once."
        return tensor.is_cpu

    def array(self,
        values,  # a tensor or an array
    ):  # an array where the values are on the host, else as they came
        "Return values in the form that is fastest where they are."
        if isinstance(values, torch.Tensor) and self.on_host(values): return values.numpy()
        return values

    def fetched(self,
        pieces: list,  # tensors, or arrays
    ) -> list:  # arrays
        "Bring tensors to the host, in one piece from each device, so that it waits once."
        found = [self.array(piece) for piece in pieces]
        for device in {piece.device for piece in found if isinstance(piece, torch.Tensor)}:
            here = [i for i, piece in enumerate(found) if _is_on(device, piece)]
            joined = torch.cat([found[i] for i in here]).cpu()
            for i, piece in zip(here, joined.split([len(found[i]) for i in here])): found[i] = piece.numpy()
        return found

    def sent(self,
        pieces: list,  # arrays, or tensors that may be there already
        devices: list,  # where each shall be
    ) -> list:  # tensors
        "Send arrays to devices, in one piece to each."
        found = [piece if isinstance(piece, torch.Tensor) else torch.from_numpy(piece) for piece in pieces]
        for device in {device for piece, device in zip(found, devices) if piece.device != device}:
            here = [i for i, piece in enumerate(found) if devices[i] == device != piece.device]
            joined = torch.cat([found[i] for i in here]).to(device)
            for i, piece in zip(here, joined.split([len(found[i]) for i in here])): found[i] = piece
        return found

    def count(self,
        mask,  # bool, tensor or array
    ) -> int:
        "Count what is True."
        mask = self.array(mask)
        if isinstance(mask, np.ndarray): return int(np.count_nonzero(mask))
        return int(torch.count_nonzero(mask))

    def total(self,
        number: int,  # of what is here
    ) -> int:  # of all processes
        "Return the sum over all processes."
        return number


def _is_on(device, piece): return isinstance(piece, torch.Tensor) and piece.device == device


ALONE = Alone()


def as_array(
    tensor: torch.Tensor,  # without a gradient
) -> torch.Tensor | np.ndarray:
    "Return the numpy array of a tensor where there is one; it is compared and counted many times faster."
    has_array = ALONE.on_host(tensor) and tensor.dtype in (torch.float32, torch.float64)
    return tensor.numpy() if has_array else tensor
