"""BiomedParse, by the names of its files."""

from tests.data.builder.readers.trees import image, listed


def test_layout(tmp_path):
    root = tmp_path / "BMP"
    for part, stems in {
        "train": ["amos_0507_31_CT_abdomen", "amos_0507_32_CT_abdomen", "144DME_as_F.jpeg_OCT_retinal", "p_1_pathology_breast", "odd"],
        "test": ["T0011.jpg_fundus_eye", "covid_1585_X-Ray_chest", "b_12_MRI-T1-Gd_brain"],
    }.items():
        for stem in stems:
            image(root / part / f"{stem}.png")
    for name in ("amos_0507_31_CT_abdomen_left+kidney", "amos_0507_31_CT_abdomen_kidney", "amos_0507_32_CT_abdomen_liver",
                 "p_1_pathology_breast_neoplastic+cells", "lost_1_CT_chest_lung"):  # fmt: skip
        image(root / "train_mask" / f"{name}.png")
    image(root / "test_mask/b_12_MRI-T1-Gd_brain_enhancing+tumor_core.png")
    items, skipped = listed("biomedparse", root, dataset="bmp")
    got = {i.id: (i.modality, i.group, i.split, [m.class_raw for m in i.masks]) for i in items}
    assert got == {
        "test/T0011.jpg_fundus_eye": ("fundus", "bmp/T0011.jpg", "test", []),
        "test/b_12_MRI-T1-Gd_brain": ("MR", "bmp/b_12", "test", ["enhancing tumor_core"]),
        "test/covid_1585_X-Ray_chest": ("X-ray", "bmp/covid_1585", "test", []),
        "train/amos_0507_31_CT_abdomen": ("CT", "bmp/amos_0507", "train", ["kidney", "left kidney"]),
        "train/amos_0507_32_CT_abdomen": ("CT", "bmp/amos_0507", "train", ["liver"]),
        "train/p_1_pathology_breast": ("pathology", "bmp/p_1", "train", ["neoplastic cells"]),
    }
    assert not any(item.complete for item in items)
    assert sorted((what.rsplit("/", 1)[1], why[:20]) for what, why in skipped) == [
        ("144DME_as_F.jpeg_OCT_retinal.png", "its name is not NAME"), ("lost_1_CT_chest_lung.png", "belongs to no image"),
        ("odd.png", "its name is not NAME"),
    ]  # fmt: skip
