"""Every data set of the paper: published numbers, official layout, archives (addresses and md5s as in torchvision).

Section 4.2 meta-trains on eight tasks and tests on five ("paper"); section 4.3 meta-trains on ImageNet in eight groups
and tests on nine ("imagenet"). Sizes of the tasks to meta-train on are the paper's; those to test on are said to be of
28, 32, 64 and 84 pixels, and which is which is our choice.
"""

from __future__ import annotations

from functools import partial

from cts_fast.data.download import Archive
from cts_fast.data.paper import imagenet, lists, quickdraw, tiny_imagenet
from cts_fast.data.paper import torchvision_sets as tv
from cts_fast.data.paper.base import DataSet

_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_IDX_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)

_TINY = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
    ".",
    ("tiny-imagenet-200",),
)


def _tiny_half(half: int) -> DataSet:
    return DataSet(
        name=f"tiny_imagenet_{'ab'[half]}",
        title=f"Tiny ImageNet, {('first', 'second')[half]} half",
        terms="part of ImageNet: research and non-commercial use",
        classes=100,
        train=50_000,
        test=5_000,
        size=64,
        roles={"paper": "train"},
        places=("tiny-imagenet-200",),
        needs=("wnids.txt", "train", "val"),
        read=partial(tiny_imagenet.read, half=half),
        layout=tiny_imagenet.LAYOUT,
        archives=(_TINY,),
    )


def _cifar(fine: bool) -> DataSet:
    name, md5, folder = (
        ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python")
        if fine
        else ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py")
    )
    return DataSet(
        name="cifar100" if fine else "cifar10",
        title="CIFAR-100, fine labels" if fine else "CIFAR-10",
        terms="no licence stated; cite Krizhevsky 2009",
        classes=100 if fine else 10,
        train=50_000,
        test=10_000,
        size=32,
        roles={"paper": "train", "imagenet": "target"} if fine else {"imagenet": "target"},
        places=(folder,),
        needs=("train", "test", "meta") if fine else ("data_batch_*", "test_batch", "batches.meta"),
        read=partial(tv.cifar, fine=fine),
        layout=f"{folder}/ as its archive holds it",
        archives=(Archive(f"https://www.cs.toronto.edu/~kriz/{name}", md5, ".", (folder,)),),
    )


def _imagenet_group(number: int, wnids: dict[str, str]) -> DataSet:
    return DataSet(
        name=f"imagenet_{number}",
        title=f"ImageNet, {imagenet.TITLES[number - 1]}",
        terms="ImageNet: research and non-commercial use",
        classes=len(wnids),
        train=None,
        least=732 * len(wnids),  # the smallest class of ILSVRC 2012 has 732 images
        test=50 * len(wnids),
        size=64,
        roles={"imagenet": "train"},
        places=("imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC", "."),
        needs=("train/n*", "val/n*"),
        read=partial(imagenet.read, wnids=wnids),
        layout=imagenet.LAYOUT,
        manual="register at image-net.org, fetch ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
        "ILSVRC2012_devkit_t12.tar.gz into the folder imagenet, and let torchvision.datasets.ImageNet unpack them",
    )


SETS: tuple[DataSet, ...] = (
    _tiny_half(0),
    _tiny_half(1),
    _cifar(fine=True),
    DataSet(
        name="stanford_dogs",
        title="Stanford Dogs",
        terms="part of ImageNet: research and non-commercial use",
        classes=120,
        train=12_000,
        test=8_580,
        size=84,
        roles={"paper": "train", "imagenet": "target"},
        places=("stanford_dogs", "StanfordDogs"),
        needs=("Images", "train_list.mat", "test_list.mat"),
        read=lists.dogs,
        layout="stanford_dogs/{Images/<wnid-breed>/*.jpg, train_list.mat, test_list.mat}",
        archives=(
            Archive(
                f"{_DOGS}/images.tar", "1bb1f2a596ae7057f99d7d75860002ef", "stanford_dogs", ("stanford_dogs/Images",)
            ),
            Archive(
                f"{_DOGS}/lists.tar",
                "edbb9f16854ec66506b5f09b583e0656",
                "stanford_dogs",
                ("stanford_dogs/train_list.mat", "stanford_dogs/test_list.mat"),
            ),
        ),
    ),
    DataSet(
        name="aircraft",
        title="FGVC-Aircraft, variants",
        terms="non-commercial research",
        classes=100,
        train=6_667,
        test=3_333,
        size=84,
        roles={"paper": "train"},
        places=("fgvc-aircraft-2013b",),
        needs=("data/variants.txt", "data/images_variant_trainval.txt", "data/images_variant_test.txt", "data/images"),
        read=tv.aircraft,
        layout="fgvc-aircraft-2013b/data/{images/*.jpg, variants.txt, images_variant_*.txt}",
        archives=(
            Archive(f"{_VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", None, ".", ("fgvc-aircraft-2013b",)),
        ),
    ),
    DataSet(
        name="cub",
        title="Caltech-UCSD Birds 200-2011",
        terms="non-commercial research and education",
        classes=200,
        train=5_994,
        test=5_794,
        size=84,
        roles={"paper": "train", "imagenet": "target"},
        places=("CUB_200_2011",),
        needs=("images", "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"),
        read=lists.cub,
        layout="CUB_200_2011/{images/<class>/*.jpg, images.txt, image_class_labels.txt, train_test_split.txt, "
        "classes.txt}",
        archives=(
            Archive(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
                ".",
                ("CUB_200_2011",),
            ),
        ),
    ),
    DataSet(
        name="fashion_mnist",
        title="Fashion-MNIST",
        terms="MIT",
        classes=10,
        train=60_000,
        test=10_000,
        size=28,
        channels=1,
        roles={"paper": "train"},
        places=("FashionMNIST/raw",),
        needs=tuple(f"{name}-ubyte" for name in _IDX),
        read=tv.fashion_mnist,
        layout="FashionMNIST/raw/ with the four idx files, unpacked (also those of Debian's dataset-fashion-mnist)",
        archives=tuple(
            Archive(f"{_FASHION}/{name}-ubyte.gz", md5, "FashionMNIST/raw", (f"FashionMNIST/raw/{name}-ubyte",))
            for name, md5 in zip(_IDX, _IDX_MD5, strict=True)
        ),
    ),
    DataSet(
        name="svhn",
        title="Street View House Numbers, cropped digits",
        terms="non-commercial use",
        classes=10,
        train=73_257,
        test=26_032,
        size=32,
        roles={"paper": "train", "imagenet": "target"},
        places=("svhn", "SVHN", "."),
        needs=("train_32x32.mat", "test_32x32.mat"),
        read=tv.svhn,
        layout="svhn/{train_32x32.mat, test_32x32.mat}",
        archives=tuple(
            Archive(
                f"http://ufldl.stanford.edu/housenumbers/{split}_32x32.mat", md5, "svhn", (f"svhn/{split}_32x32.mat",)
            )
            for split, md5 in (
                ("train", "e26dedcc434d2e4c54c9b2d4a06d8373"),
                ("test", "eb5a983be6a315427106f1b164d9cef3"),
            )
        ),
    ),
    DataSet(
        name="stanford_cars",
        title="Stanford Cars",
        terms="research",
        classes=196,
        train=8_144,
        test=8_041,
        size=84,
        roles={"paper": "target"},
        places=("stanford_cars",),
        needs=(
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
            "cars_test_annos_withlabels.mat",
            "cars_train",
            "cars_test",
        ),
        read=tv.cars,
        layout="stanford_cars/{cars_train/*.jpg, cars_test/*.jpg, devkit/{cars_train_annos,cars_meta}.mat, "
        "cars_test_annos_withlabels.mat}, images also nested (cars_train/cars_train)",
        manual="its authors' address is gone: take cars_train, cars_test, the devkit and "
        "cars_test_annos_withlabels.mat from a copy, for example on Kaggle",
    ),
    DataSet(
        name="quickdraw",
        title=f"QuickDraw, {quickdraw.TRAIN} + {quickdraw.TEST} drawings a category",
        terms="CC BY 4.0",
        classes=345,
        train=345 * quickdraw.TRAIN,
        test=345 * quickdraw.TEST,
        size=28,
        channels=1,
        roles={"paper": "target"},
        places=("quickdraw/numpy_bitmap", "quickdraw"),
        needs=("*.npy",),
        read=quickdraw.read,
        layout=quickdraw.LAYOUT,
        archives=quickdraw.archives(),
        manual="39 GB in all",
    ),
    DataSet(
        name="flowers",
        title="Oxford 102 Flowers",
        terms="research",
        classes=102,
        train=2_040,
        test=6_149,
        size=84,
        roles={"paper": "target", "imagenet": "target"},
        places=("flowers-102",),
        needs=("jpg", "imagelabels.mat", "setid.mat"),
        read=tv.flowers,
        layout="flowers-102/{jpg/image_*.jpg, imagelabels.mat, setid.mat}",
        archives=(
            Archive(
                f"{_VGG}/flowers/102/102flowers.tgz",
                "52808999861908f626f3c1f4e79d11fa",
                "flowers-102",
                ("flowers-102/jpg",),
            ),
            *(
                Archive(f"{_VGG}/flowers/102/{name}.mat", md5, "flowers-102", (f"flowers-102/{name}.mat",))
                for name, md5 in (
                    ("imagelabels", "e0620be6f572b9609742df49c70aed4d"),
                    ("setid", "a5357ecc9cb78c4bef273ce3793fc85c"),
                )
            ),
        ),
    ),
    DataSet(
        name="pets",
        title="Oxford-IIIT Pets",
        terms="CC BY-SA 4.0",
        classes=37,
        train=3_680,
        test=3_669,
        size=84,
        roles={"paper": "target", "imagenet": "target"},
        places=("oxford-iiit-pet",),
        needs=("images", "annotations/trainval.txt", "annotations/test.txt"),
        read=lists.pets,
        layout="oxford-iiit-pet/{images/*.jpg, annotations/{trainval,test}.txt}",
        archives=tuple(
            Archive(f"{_VGG}/pets/data/{name}.tar.gz", md5, "oxford-iiit-pet", (f"oxford-iiit-pet/{name}",))
            for name, md5 in (
                ("images", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
                ("annotations", "95a8c909bbe2e81eed6a22bccdf3f68f"),
            )
        ),
    ),
    DataSet(
        name="stl10",
        title="STL-10, labelled images",
        terms="part of ImageNet: research and non-commercial use",
        classes=10,
        train=5_000,
        test=8_000,
        size=84,
        roles={"paper": "target"},
        places=("stl10_binary",),
        needs=("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt"),
        read=tv.stl10,
        layout="stl10_binary/{train,test}_{X,y}.bin, stl10_binary/class_names.txt",
        archives=(
            Archive(
                "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                "91f7769df0f17e558f3565bffb0c7dfb",
                ".",
                ("stl10_binary",),
            ),
        ),
    ),
    _cifar(fine=False),
    DataSet(
        name="food101",
        title="Food-101",
        terms="research; images of foodspotting.com",
        classes=101,
        train=75_750,
        test=25_250,
        size=84,
        roles={"imagenet": "target"},
        places=("food-101",),
        needs=("meta/train.json", "meta/test.json", "images"),
        read=tv.food,
        layout="food-101/{images/<class>/*.jpg, meta/{train,test}.json}",
        archives=(
            Archive(
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                "85eeb15f3717b99a5da872d97d918f87",
                ".",
                ("food-101",),
            ),
        ),
    ),
    DataSet(
        name="dtd",
        title="Describable Textures",
        terms="research",
        classes=47,
        train=3_760,
        test=1_880,
        size=84,
        roles={"imagenet": "target"},
        places=("dtd",),
        needs=("dtd/images", "dtd/labels/train1.txt", "dtd/labels/val1.txt", "dtd/labels/test1.txt"),
        read=tv.dtd,
        layout="dtd/dtd/{images/<class>/*.jpg, labels/{train,val,test}1.txt}",
        archives=(
            Archive(f"{_VGG}/dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", "dtd", ("dtd/dtd",)),
        ),
    ),
    *(_imagenet_group(number, wnids) for number, wnids in enumerate(imagenet.groups(), 1)),
)
"""All tasks, those to meta-train on first in each suite."""
