"""Small talk in seven languages by a little grammar: text without one right answer, for a teacher to be unsure about."""

from __future__ import annotations

import random
import unicodedata

from persea.chat import Conversation
from persea.corpus import Prompt
from persea.measure import Item

ASK = {"en": "Tell me something.", "zh": "说点什么吧。", "ja": "何か話して。", "ko": "아무 말이나 해 봐요.", "vi": "Nói gì đó đi.",
       "id": "Ceritakan sesuatu.", "th": "เล่าอะไรหน่อย"}
# one choice a slot; each sentence of a language is about as likely as any other
SLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "en": (("Today ", "This morning ", "Yesterday ", "In May ", "At night ", "Now and then "),
           ("the market ", "the river ", "our street ", "the old house ", "the city ", "my room "),
           ("is quiet", "is full of people", "looks new", "smells of rain", "feels cold", "is big"),
           (", and ", ", but ", "; so ", ", while "),
           ("my sister ", "the baker ", "a cat ", "everybody ", "the teacher ", "nobody "),
           ("sings.", "buys tea.", "waits.", "reads a letter.", "goes home.", "laughs.")),
    "zh": (("今天", "早上", "昨天", "五月", "晚上", "有时"), ("市场", "河边", "这条街", "老房子", "城市", "我的房间"),
           ("很安静", "人很多", "很新", "下着雨", "很冷", "很大"), ("，", "，但是", "，所以", "，而且"),
           ("妹妹", "老师", "一只猫", "大家", "朋友", "他"), ("在唱歌。", "买茶。", "等着。", "看信。", "回家。", "笑了。")),
    "ja": (("今日は", "今朝は", "昨日は", "五月は", "夜は", "時々"), ("市場が", "川が", "この道が", "古い家が", "町が", "部屋が"),
           ("静かで", "にぎやかで", "新しくて", "雨で", "寒くて", "大きくて"), ("、", "、でも", "、だから", "、それに"),
           ("妹が", "先生が", "猫が", "みんなが", "友だちが", "彼が"), ("歌う。", "お茶を買う。", "待つ。", "手紙を読む。", "帰る。", "笑う。")),
    "ko": (("오늘은 ", "아침에는 ", "어제는 ", "오월에는 ", "밤에는 ", "가끔 "), ("시장이 ", "강이 ", "이 길이 ", "낡은 집이 ", "도시가 ", "방이 "),
           ("조용하고", "붐비고", "새롭고", "비가 오고", "춥고", "크고"), (", ", ", 그래도 ", ", 그래서 ", ", 또 "),
           ("동생이 ", "선생님이 ", "고양이가 ", "모두 ", "친구가 ", "그가 "),
           ("노래해요.", "차를 사요.", "기다려요.", "편지를 읽어요.", "집에 가요.", "웃어요.")),
    "vi": (("Hôm nay ", "Sáng nay ", "Hôm qua ", "Tháng năm ", "Buổi tối ", "Đôi khi "),
           ("khu chợ ", "dòng sông ", "con đường ", "ngôi nhà cũ ", "thành phố ", "căn phòng "),
           ("yên tĩnh", "đông người", "trông mới", "có mưa", "lạnh", "rất lớn"), (", và ", ", nhưng ", ", nên ", ", còn "),
           ("em tôi ", "cô giáo ", "con mèo ", "mọi người ", "bạn tôi ", "anh ấy "), ("hát.", "mua trà.", "chờ.", "đọc thư.", "về nhà.", "cười.")),
    "id": (("Hari ini ", "Pagi ini ", "Kemarin ", "Bulan Mei ", "Malam ini ", "Kadang "),
           ("pasar ", "sungai ", "jalan ini ", "rumah lama ", "kota ", "kamar saya "),
           ("sepi", "ramai", "tampak baru", "hujan", "dingin", "sangat besar"), (", dan ", ", tetapi ", ", jadi ", ", lalu "),
           ("adik saya ", "guru ", "kucing ", "semua orang ", "teman saya ", "dia "),
           ("bernyanyi.", "membeli teh.", "menunggu.", "membaca surat.", "pulang.", "tertawa.")),
    "th": (("วันนี้", "เช้านี้", "เมื่อวาน", "เดือนพฤษภาคม", "ตอนกลางคืน", "บางที"), ("ตลาด", "แม่น้ำ", "ถนนนี้", "บ้านเก่า", "เมือง", "ห้อง"),
           ("เงียบ", "คนเยอะ", "ดูใหม่", "ฝนตก", "เย็น", "ใหญ่มาก"), (" และ", " แต่", " ดังนั้น", " แล้ว"),
           ("น้องสาว", "ครู", "แมว", "ทุกคน", "เพื่อน", "เขา"), ("ร้องเพลง", "ซื้อชา", "รอ", "อ่านจดหมาย", "กลับบ้าน", "หัวเราะ")),
}


def small_talk(rng: random.Random, language: str = "") -> Item:
    """One sentence of small talk, and the question before it."""
    language = language or rng.choice(list(SLOTS))
    said = unicodedata.normalize("NFC", "".join(rng.choice(slot) for slot in SLOTS[language]))
    return Item(Prompt(f"prose/talk/{language}/{said}", Conversation.ask(ASK[language]), "prose", language), said)
