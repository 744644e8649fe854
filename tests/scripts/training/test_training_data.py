"""Order and randomness of the training data: the same for any number of workers, processes and starts."""

import tarfile
from io import BytesIO
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import FakeData
from train_runs import photo_folder, photos

from common.sampler import SampleKey, SeededDataset, seeded
from training.args import parse_args
from training.data import BatchAugmentation, TrainLoader, ValidationLoader
from training.datasets import check_classes, create_datasets
from training.sampler import ResumableSampler

CPU = torch.device("cpu")
ONE_SPLIT = ["--val-split", "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


def train_loader(*options, rank=0, world_size=1):
    args = parse_args(["-b", "4", "--img-size", "32", "--aa", "rand-m9-mstd0.5", *map(str, options)])
    config = resolve_data_config(vars(args), pretrained_cfg={})
    train_set, _ = create_datasets(args)
    return TrainLoader(train_set, args, config, CPU, rank, world_size)


def images(batches):
    return torch.cat([images for images, _ in batches])


def test_batches_do_not_depend_on_workers_or_on_the_start(folder):
    whole = train_loader("--data-dir", folder, "-j", 0)
    assert len(whole) == 5
    epoch = images(whole.batches(1))
    assert epoch.shape == (20, 3, 32, 32)
    resumed = train_loader("--data-dir", folder, "-j", 2)
    assert images(resumed.batches(1, start=3)).equal(epoch[12:])
    assert not images(resumed.batches(2)).equal(epoch)  # another epoch: other order and augmentation
    assert images(resumed.batches(1)).equal(epoch)


def test_ranks_share_out_the_global_batches_of_one_process(folder):
    one = images(train_loader("--data-dir", folder, "-j", 0).batches(0))
    ranks = [
        images(train_loader("--data-dir", folder, "-j", 0, "-b", 2, rank=rank, world_size=2).batches(0))
        for rank in (0, 1)
    ]
    assert torch.stack(ranks, dim=1).flatten(0, 1).equal(one)


def test_skipped_samples_are_not_decoded():
    class Decoded(FakeData):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)[1], 0

    read = []
    dataset = SeededDataset(Decoded(10, (3, 4, 4)), seed=0)
    sampler = ResumableSampler(DistributedSampler(dataset, 1, 0, seed=0))
    order = [key.index for key in sampler]
    sampler.set_position(epoch=0, start=6)
    list(DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=lambda batch: batch))
    assert read == order[6:]
    assert len(sampler) == 10


def test_repeated_augmentation_shows_an_image_to_several_ranks(folder):
    loaders = [train_loader("--data-dir", folder, "-j", 0, "--aug-repeats", 2, rank=r, world_size=2) for r in (0, 1)]
    keys = [list(loader.sampler) for loader in loaders]
    assert [key.index for key in keys[0]] == [key.index for key in keys[1]]
    assert not images(loaders[0].batches(0)).equal(images(loaders[1].batches(0)))


def test_repeated_augmentation_has_an_order_for_each_seed_and_epoch(folder):
    def order(seed, epoch):
        loader = train_loader("--data-dir", folder, "-j", 0, "--aug-repeats", 2, "--seed", seed)
        loader.sampler.set_position(epoch)
        return [key.index for key in loader.sampler]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_seeding_a_sample_leaves_the_run_its_random_state():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    draws = []
    for _ in range(2):
        with seeded((1, 2, 3)):
            draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]
    assert (torch.rand(1), np.random.rand()) == expected


def test_unreadable_images_of_a_torchvision_set_are_replaced_and_noted(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i, photo in enumerate(photos()[:3]):
        (tmp_path / "train" / "a" / f"{i}.jpg").write_bytes(photo.read_bytes() if i != 1 else b"no image")
    loader = train_loader("--dataset", "torch/image_folder", "--data-dir", tmp_path, "-j", 0, "-b", 3, *ONE_SPLIT)
    ((_, labels),) = loader.batches(0)
    assert labels.tolist() == [0, 0, 0]
    assert loader.corrupt_images() == (1, ["index 1"])


def test_ten_unreadable_images_in_a_row_are_an_error():
    class Unreadable(FakeData):
        def __getitem__(self, index):
            raise OSError("broken")

    with pytest.raises(RuntimeError, match="10 images in a row from index 3"):
        SeededDataset(Unreadable(20), seed=0)[SampleKey(3, 0, 0)]


def shards(root, corrupt=False, ends=(0, 10, 20)):
    """WebDataset shards of photos, two of ten each; one sample of the first is no image if asked for."""
    for shard, (start, end) in enumerate(pairwise(ends)):
        with tarfile.open(root / f"photos-{shard}.tar", "w") as tar:
            for i, photo in enumerate(photos()[start:end]):
                image = b"no image" if corrupt and shard == i == 0 else photo.read_bytes()
                for suffix, data in (("jpg", image), ("cls", str(i % 2).encode())):
                    entry = tarfile.TarInfo(f"{shard}{i:03d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, BytesIO(data))
    split = f"photos-{{0..{len(ends) - 2}}}.tar|20"
    return ["--dataset", "wds/photos", "--data-dir", root, "--train-split", split, "--val-split", split]


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_stream_replays_to_the_same_batches(tmp_path, workers):
    options = [*shards(tmp_path), "-j", workers]
    loader = train_loader(*options)
    epochs = [images(loader.batches(epoch)) for epoch in (0, 1)]
    assert len(epochs[0]) == 4 * len(loader) >= 20
    assert not epochs[0].equal(epochs[1])
    assert images(train_loader(*options).batches(1, start=2)).equal(epochs[1][8:])


def test_corrupt_samples_of_a_webdataset_stream_are_skipped_and_counted(tmp_path):
    loader = train_loader(*shards(tmp_path, corrupt=True), "-j", 1)
    batches = list(loader.batches(0))
    assert len(batches) == len(loader) == 5
    count, _ = loader.corrupt_images()
    assert count >= 1


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_hugging_face_data_set_resumes_to_the_same_batches(folder, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["--dataset", f"{kind}/{folder}", "--data-dir", tmp_path, "--train-num-samples", 20, "-j", 1]
    options += ["--val-num-samples", 20]
    loader = train_loader(*options)
    assert len(loader) == 5
    epoch = images(loader.batches(1))
    assert epoch.shape == (20, 3, 32, 32)
    assert images(train_loader(*options).batches(1, start=2)).equal(epoch[8:])


def validation_images(options, rank=0, world_size=1):
    """What a process sees of the validation set, rounded so that it can be counted."""
    args = parse_args(["-b", "4", "--img-size", "32", *map(str, options)])
    config = resolve_data_config(vars(args), pretrained_cfg={})
    _, val_set = create_datasets(args)
    # As timm's readers find them where there are several processes.
    val_set.reader.dist_rank, val_set.reader.dist_num_replicas = rank, world_size
    loader = ValidationLoader(val_set, args, config, CPU, rank, world_size)
    return [image.numpy().tobytes() for batch, _ in loader for image in batch]


def test_validation_of_a_stream_sees_each_image_once(tmp_path):
    assert len(validation_images([*shards(tmp_path), "-j", 1])) == 20


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_see_each_image_of_a_validation_stream_once(tmp_path, world_size, workers):
    options = [*shards(tmp_path, ends=(0, 3, 13, 20)), "-j", workers]  # four processes are more than three shards
    every = validation_images(options)
    shares = [validation_images(options, rank, world_size) for rank in range(world_size)]
    assert len(every) == 20
    assert sorted(chain.from_iterable(shares)) == sorted(every)


def test_fewer_shards_than_readers_are_refused_in_training(tmp_path):
    options = [*shards(tmp_path), "-j", 3]
    with pytest.raises(ValueError, match="2 shards for training are fewer than 3 that read them"):
        train_loader(*options)


def test_too_many_labels_for_the_model_is_an_error_that_says_what_to_do(folder):
    args = parse_args(["--data-dir", str(folder)])
    with pytest.raises(ValueError, match="2 classes, the model 1: give --num-classes 2"):
        check_classes(create_datasets(args)[0], 1, chosen=True)


def test_missing_data_is_an_error_that_names_the_place(tmp_path):
    args = parse_args(["--data-dir", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="nowhere"):
        create_datasets(args)


def test_fewer_images_than_a_batch_is_an_error(folder):
    with pytest.raises(ValueError, match="20 images, fewer than one batch of 32"):
        train_loader("--data-dir", folder, "-j", 0, "-b", 32)


def test_mixing_stops_after_its_epoch_and_keeps_soft_labels():
    args = parse_args(["--synthetic", "--mixup", "0.5", "--mixup-off-epoch", "3", "--smoothing", "0.1"])
    augment = BatchAugmentation(args, 10, CPU)
    batch, labels = torch.rand(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])
    np.random.seed(0)
    mixed, soft = augment(batch.clone(), labels, epoch=2)
    assert not mixed.equal(batch)
    assert soft.shape == (4, 10)
    same, soft = augment(batch.clone(), labels, epoch=3)
    assert same.equal(batch)
    assert soft.argmax(1).equal(labels)
    assert soft.max().item() == pytest.approx(0.91)
